"""Open files and addresses that aren't trusted: regular files only, allowed formats and protocols only."""
