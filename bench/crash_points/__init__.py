"""Kill commands at every write, rename and sync, run them again, and compare: what does a crash leave?

Parts: `shim.c`, preloaded, counts the calls and kills, fails or delays one; `worker` runs commands under it;
`scenarios` says which commands, from which state; `table` kills, runs again and judges.
"""
