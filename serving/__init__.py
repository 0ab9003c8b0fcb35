"""The HTTP face of bundles: OpenAI's API, and a page that shows which visual tokens are kept."""
