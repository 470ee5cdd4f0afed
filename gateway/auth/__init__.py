"""Who is asking, where a token of another system says so: OpenID Connect."""
