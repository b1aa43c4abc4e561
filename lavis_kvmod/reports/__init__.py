"""Results for people: tables, and Markdown pages with pictures."""
