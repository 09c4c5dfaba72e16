"""The service desk's database: a company's people, licences and tickets, and the user's own device."""

from __future__ import annotations

from typing import Literal

from ray_app.tau2.toolkit import Table

Priority = Literal["low", "normal", "high"]
Category = Literal["hardware", "software", "licence", "network"]


class Employee(Table):
    employee_id: str
    name: str
    email: str
    contract: Literal["staff", "contractor"]
    lock: Literal["none", "wrong_password", "security"]
    vpn_profile: Literal["active", "expired"]
    licences: list[str]


class Licence(Table):
    product: str
    seats: int
    seats_taken: int
    staff_only: bool
    needs_approval: bool


class Ticket(Table):
    ticket_id: str
    employee_id: str
    category: Category
    subject: str
    priority: Priority
    status: Literal["open", "waiting for parts", "closed"]


class DeskData(Table):
    employees: dict[str, Employee]
    licences: dict[str, Licence]
    tickets: dict[str, Ticket]


class Device(Table):
    """The laptop that the user sits at. `profile_active` follows the owner's VPN profile."""

    owner_id: str = ""
    wifi: Literal["on", "off"] = "on"
    vpn_client: Literal["current", "outdated"] = "current"
    vpn: Literal["connected", "disconnected"] = "connected"
    profile_active: bool = True
    disk: Literal["fine", "full"] = "fine"
