"""What the agent of the service desk can look up and do."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from ray_app.tau2.service_desk.data import Category, DeskData, Employee, Licence, Priority, Ticket
from ray_app.tau2.toolkit import Toolkit, tool

EmployeeId = Annotated[str, Field(description="such as E101")]
TicketId = Annotated[str, Field(description="such as T-2001")]
Product = Annotated[str, Field(description="name of a licensed product, such as diagrams")]


class AgentTools(Toolkit):
    db: DeskData

    @tool("read")
    def find_employee(self, email: Annotated[str, Field(description="work e-mail address")]) -> Employee:
        """Find an employee by e-mail address: id, contract, account lock, VPN profile, licences."""
        for employee in self.db.employees.values():
            if employee.email == email.strip().lower():
                return employee
        raise ValueError(f"no employee has the e-mail address {email}")

    @tool("read")
    def get_licence(self, product: Product) -> Licence:
        """Look up a product's licence: seats, seats taken, and who may have one."""
        return self._licence(product)

    @tool("read")
    def list_tickets(self, employee_id: EmployeeId) -> list[Ticket]:
        """List the tickets that an employee has opened, closed ones too."""
        owner = self._employee(employee_id).employee_id
        return [ticket for ticket in self.db.tickets.values() if ticket.employee_id == owner]

    @tool("read")
    def get_ticket(self, ticket_id: TicketId) -> Ticket:
        """Look up a ticket: its owner, subject, priority and status."""
        return self._ticket(ticket_id)

    @tool("write")
    def unlock_account(self, employee_id: EmployeeId) -> Employee:
        """Unlock an employee's account, so that signing in works again."""
        employee = self._employee(employee_id)
        if employee.lock == "none":
            raise ValueError(f"the account of {employee_id} is not locked")
        employee.lock = "none"
        return employee

    @tool("write")
    def assign_licence(self, employee_id: EmployeeId, product: Product) -> Employee:
        """Give an employee a seat of a product's licence."""
        employee, licence = self._employee(employee_id), self._licence(product)
        if product in employee.licences:
            raise ValueError(f"{employee_id} has a licence of {product} already")
        if licence.seats_taken >= licence.seats:
            raise ValueError(f"no seat of {product} is free")
        licence.seats_taken += 1
        employee.licences.append(product)
        return employee

    @tool("write")
    def release_licence(self, employee_id: EmployeeId, product: Product) -> Employee:
        """Take back an employee's seat of a product's licence, when it is no longer needed."""
        employee, licence = self._employee(employee_id), self._licence(product)
        if product not in employee.licences:
            raise ValueError(f"{employee_id} has no licence of {product}")
        employee.licences.remove(product)
        licence.seats_taken -= 1
        return employee

    @tool("write")
    def renew_vpn_profile(self, employee_id: EmployeeId) -> Employee:
        """Renew an employee's expired VPN profile for another year."""
        employee = self._employee(employee_id)
        employee.vpn_profile = "active"
        return employee

    @tool("write")
    def open_ticket(
        self,
        employee_id: EmployeeId,
        category: Annotated[Category, Field(description="what the request is about")],
        priority: Annotated[Priority, Field(description="high only where the employee cannot work")],
    ) -> Ticket:
        """Open a new ticket for an employee, for what somebody has to do by hand."""
        owner = self._employee(employee_id).employee_id
        ticket_id = f"T-{2001 + len(self.db.tickets)}"
        ticket = Ticket(
            ticket_id=ticket_id,
            employee_id=owner,
            category=category,
            subject=f"{category} request",
            priority=priority,
            status="open",
        )
        self.db.tickets[ticket_id] = ticket
        return ticket

    @tool("write")
    def set_ticket_priority(
        self, ticket_id: TicketId, priority: Annotated[Priority, Field(description="the new priority")]
    ) -> Ticket:
        """Change how urgent an open ticket is."""
        ticket = self._ticket(ticket_id)
        if ticket.status == "closed":
            raise ValueError(f"ticket {ticket_id} is closed")
        ticket.priority = priority
        return ticket

    @tool("write")
    def close_ticket(self, ticket_id: TicketId) -> Ticket:
        """Close a ticket that is settled."""
        ticket = self._ticket(ticket_id)
        if ticket.status == "closed":
            raise ValueError(f"ticket {ticket_id} is closed already")
        ticket.status = "closed"
        return ticket

    @tool("generic")
    def transfer_to_person(
        self, reason: Annotated[str, Field(description="what the person has to know, in one sentence")]
    ) -> str:
        """Hand the dialogue to a person of the service desk, where the policy says so."""
        return "A person of the service desk takes over."

    def assert_account_unlocked(self, employee_id: str) -> bool:
        return self._employee(employee_id).lock == "none"

    def assert_vpn_profile(self, employee_id: str, expected: str) -> bool:
        return self._employee(employee_id).vpn_profile == expected

    def _employee(self, employee_id: str) -> Employee:
        if employee_id not in self.db.employees:
            raise ValueError(f"no employee has the id {employee_id}")
        return self.db.employees[employee_id]

    def _licence(self, product: str) -> Licence:
        if product not in self.db.licences:
            raise ValueError(f"no product is called {product}; there are {', '.join(self.db.licences)}")
        return self.db.licences[product]

    def _ticket(self, ticket_id: str) -> Ticket:
        if ticket_id not in self.db.tickets:
            raise ValueError(f"no ticket has the id {ticket_id}")
        return self.db.tickets[ticket_id]
