"""Policies that decide for every query which keys it sees: one file each."""
