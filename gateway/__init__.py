"""Requests in and out: tenants, routing, relay, measurement, and the command line."""
