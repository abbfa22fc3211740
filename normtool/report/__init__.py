"""Rendering of results: rich tables, JSON, CSV, Markdown. Nothing here decides anything."""
