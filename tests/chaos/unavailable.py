"""What a fault's tool raises where this machine cannot do it: the suite then leaves that kind out."""

from __future__ import annotations


class Unavailable(Exception):
    """The fault cannot be made here; the message is the reason, in one line."""
