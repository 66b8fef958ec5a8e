"""What several test files share. Imported as `helpers.…`: tests/ is on the path of pytest and of what it starts."""
