"""The console: one page for operators, served by the gateway itself. See docs/console.md."""
