"""Reports for a person: `explain`, logs, tables and `doctor`."""
