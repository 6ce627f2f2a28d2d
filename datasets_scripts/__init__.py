"""Builders that turn datasets in their published layouts into USCDF rows."""
