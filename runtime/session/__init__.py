"""Videos that are asked questions: what a session shares, answers and their streams, admission, chats.

May be imported from live/, video_qa.py, batch.py and cli/; imports encoding/, pipeline/ and what is below.
"""
