"""A network card that messages and exchanges share fairly: nobody gets less than half of it unless it wants less.

Exchanges of an expert group go one after the other, since they share a communicator; what leaves beside them are
messages to neighbouring pipeline ranks. Each is measured in the seconds that it takes with the card to itself.
"""


class Card:
    """messages: seconds of them that leave from the beginning on."""

    def __init__(self, messages: float = 0.0) -> None:
        self.messages, self.now = messages, 0.0

    def exchange(self, ready: float, seconds: float, share: float) -> tuple[float, float]:
        """Post one that would take so many seconds and use `share` of the card: when it begins, and when it ends."""
        begin = max(ready, self.now)
        self.messages = max(0.0, self.messages - (begin - self.now))
        given = min(share, 0.5) if self.messages else share
        slower = share / given if given else 1.0
        together = min(seconds * slower, self.messages / (1 - given) if self.messages else 0.0)
        self.now = begin + together + (seconds - together / slower)
        self.messages = max(0.0, self.messages - together * (1 - given) - (self.now - begin - together))
        return begin, self.now
