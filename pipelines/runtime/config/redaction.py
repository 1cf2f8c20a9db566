"""Addresses as they may be shown: without users, passwords and queries."""

import re


def without_credentials(text: str, *, queries: bool = False) -> str:
    """Return ``text`` with user and password of every address in it blotted out.

    Args:
        text: Anything that is to be shown or kept.
        queries: Also blot out what follows ``?``: signatures of stores. Not from a database's address, which needs it.
    """
    text = re.sub(r"(://)[^/\s'\"]*@", r"\1***@", text)
    text = re.sub(r"(://)[^/\s'\"@]*:[^\s'\"@]*@", r"\1***@", text)  # a password may hold a slash
    text = re.sub(r"([?&](?:password|passwd|pwd|sslpassword|token)=)[^&\s'\"]*", r"\1***", text, flags=re.IGNORECASE)
    return re.sub(r"(://[^?\s'\"]*\?)[^\s'\"]*", r"\1***", text) if queries else text
