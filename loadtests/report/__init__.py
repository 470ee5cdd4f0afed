"""Reports for people: one HTML file that needs nothing else, and Markdown. Everything in them comes from the JSON report."""
