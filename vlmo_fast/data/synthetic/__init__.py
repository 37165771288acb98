"""Data that is made here."""
