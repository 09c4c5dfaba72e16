"""What the user can look at and do on the own laptop; a hidden function sets a task's scene."""

from __future__ import annotations

from ray_app.tau2.service_desk.data import Device
from ray_app.tau2.toolkit import Toolkit, tool


class UserTools(Toolkit):
    db: Device

    @tool("read")
    def check_device(self) -> Device:
        """Look at the laptop: Wi-Fi, VPN client, VPN connection, disk."""
        return self.db

    @tool("write")
    def turn_wifi_on(self) -> str:
        """Turn the laptop's Wi-Fi on."""
        self.db.wifi = "on"
        return "Wi-Fi is on."

    @tool("write")
    def update_vpn_client(self) -> str:
        """Update the VPN client to its current version."""
        if self.db.wifi == "off":
            raise ValueError("no network: the Wi-Fi is off")
        if self.db.disk == "full":
            raise ValueError("the disk is full")
        self.db.vpn_client = "current"
        return "The VPN client is current now."

    @tool("write")
    def connect_vpn(self) -> str:
        """Connect to the VPN."""
        problem = self._vpn_problem()
        if problem:
            raise ValueError(problem)
        self.db.vpn = "connected"
        return "The VPN is connected."

    @tool("write")
    def empty_cache(self) -> str:
        """Empty the browser's cache, which frees disk space."""
        self.db.disk = "fine"
        return "The disk has free space again."

    def set_scene(
        self,
        owner_id: str,
        wifi: str = "on",
        vpn_client: str = "current",
        vpn: str = "disconnected",
        disk: str = "fine",
    ) -> None:
        """The state in which a task finds the laptop. No tool."""
        scene = {"owner_id": owner_id, "wifi": wifi, "vpn_client": vpn_client, "vpn": vpn, "disk": disk}
        for name, value in scene.items():
            setattr(self.db, name, value)

    def assert_vpn(self, expected: str) -> bool:
        return self.db.vpn == expected

    def assert_disk(self, expected: str) -> bool:
        return self.db.disk == expected

    def _vpn_problem(self) -> str:
        if self.db.wifi == "off":
            return "no network: the Wi-Fi is off"
        if self.db.vpn_client == "outdated":
            return "the VPN client is outdated and refuses to connect"
        return "" if self.db.profile_active else "the VPN profile has expired"
