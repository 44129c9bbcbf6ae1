"""Prices, dates and durations as people read them."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal

#: The languages whose way of writing prices and dates the shop knows.
LANGUAGES = {"en": "English", "de": "Deutsch", "fr": "Français"}

NARROW_SPACE = "\N{NARROW NO-BREAK SPACE}"
SPACE = "\N{NO-BREAK SPACE}"


def money(cents: int, language: str = "en") -> str:
    """An amount of euro cents: `€1,234.50`, `1.234,50 €` or `1 234,50 €`."""
    amount = f"{Decimal(cents) / 100:,.2f}"
    if language == "de":
        return amount.translate(str.maketrans(",.", ".,")) + f"{SPACE}€"
    if language == "fr":
        return amount.translate(str.maketrans(",.", f"{NARROW_SPACE},")) + f"{SPACE}€"
    return f"€{amount}"


def moment(when: datetime, language: str = "en") -> str:
    """A date and time in UTC: `22 Nov 2026, 12:30 UTC`, `22.11.2026, 12:30 UTC` or with slashes."""
    when = when.astimezone(UTC)
    if language == "de":
        return f"{when:%d.%m.%Y, %H:%M} UTC"
    if language == "fr":
        return f"{when:%d/%m/%Y, %H:%M} UTC"
    return f"{when.day} {when:%b %Y, %H:%M} UTC"


def duration(span: timedelta) -> str:
    """A length of time in its two largest units: `1 h 59 min`."""
    seconds = max(0, int(span.total_seconds()))
    days, hours = divmod(seconds // 3600, 24)
    minutes = seconds // 60 % 60
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {seconds % 60} s"
    return f"{seconds} s"


def size(count: int) -> str:
    """A number of bytes: `412 bytes` or `1.2 KB`."""
    return f"{count} bytes" if count < 1000 else f"{Decimal(count) / 1000:.1f} KB"
