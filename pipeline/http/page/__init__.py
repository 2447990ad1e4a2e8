"""The page at `/`: one static file, index.html, and the endpoint that serves it."""
