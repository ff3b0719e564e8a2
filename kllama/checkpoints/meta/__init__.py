"""Meta's own directories: `params.json` and `consolidated.*.pth`."""
