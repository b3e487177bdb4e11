"""Tests of launcher/tools."""
