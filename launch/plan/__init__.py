"""From a spec to a plan: everything that will run, as plain data."""
