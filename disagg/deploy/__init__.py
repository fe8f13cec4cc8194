"""Bringing disagg onto machines: systemd units and their installation."""
