"""Decisions as pure functions of integers: no arrays, no devices, no clock."""
