"""Tests of launcher/data."""
