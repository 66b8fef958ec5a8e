"""Code that several test files share. Imported as `helpers.…`: pytest and the processes that tests start have tests/ on
their path."""
