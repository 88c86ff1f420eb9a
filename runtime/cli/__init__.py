"""The command ppllava-run: its options, and one module for each mode (ask and chat, live, batch).

Nothing imports it. It imports batch.py, video_qa.py and the packages below them.
"""
