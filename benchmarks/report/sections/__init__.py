"""Sections of the report, one file each: `section(results, images)` returns Markdown and writes its figures.

A result that is missing reads "not measured".
"""
