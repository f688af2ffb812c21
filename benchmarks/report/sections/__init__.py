"""The chapters of the report, one file each: `chapter(results, images)` is its Markdown, its figures go to `images`.

A file that is missing, or a cell that is missing in it, reads "not measured".
"""
