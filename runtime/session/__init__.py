"""Videos that are asked questions: what a session shares, encoding, answers and their streams, admission, chats.

May be imported from live/, video_qa.py, batch.py and cli/; imports pipeline/ and the rooms below it.
"""
