"""The command ppllava-run: its options, and one module for each mode (ask and chat, live, batch).

Nothing imports it; imports every other room of the runtime.
"""
