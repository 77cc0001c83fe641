"""Programs that show what the disk and the server give: the limit of what is possible."""
