"""Encryption of payloads at rest: AES-256-GCM from the ``cryptography`` package.

Each session has its own encryption key, derived with HMAC-SHA256 from the application's key and
the session key. So random nonces stay safe for any number of sessions, and a payload can't be
decrypted under another session key. The authenticated header holds the record's times, so a payload
with altered times can't be decrypted either. Source: NIST SP 800-38D, section 8.3.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence

from ..errors import SettingError, UnreadableRecord

_KEY_ID_BYTES = 4
_NONCE_BYTES = 12


class Cipher:
    """Encrypts with the first of ``keys``, and decrypts with any of them.

    Raises ``SettingError`` if the ``cryptography`` package isn't installed.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
        except ImportError:
            raise SettingError(
                "SESSION_ENCRYPTION_KEYS needs the cryptography package: "
                "install the encryption extra, flask-gsession[encryption]"
            ) from None
        self._aesgcm = AESGCM
        self._invalid = InvalidTag
        self._keys = {hashlib.sha256(key).digest()[:_KEY_ID_BYTES]: key for key in keys}
        self._current = hashlib.sha256(keys[0]).digest()[:_KEY_ID_BYTES]

    def _derive(self, key_id: bytes, session_key: bytes) -> bytes:
        return hmac.digest(self._keys[key_id], b"flask-gsession record 1 " + session_key, "sha256")

    def seal(self, body: bytes, session_key: bytes, header: bytes) -> bytes:
        """Encrypt ``body``: returns key id, nonce and ciphertext. Also authenticates ``header``."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        cipher = self._aesgcm(self._derive(self._current, session_key))
        return self._current + nonce + cipher.encrypt(nonce, body, header + session_key)

    def open(self, sealed: bytes, session_key: bytes, header: bytes) -> bytes:
        """Decrypt. Raises ``UnreadableRecord`` for an unknown key or an altered payload."""
        key_id, sealed = sealed[:_KEY_ID_BYTES], sealed[_KEY_ID_BYTES:]
        if len(sealed) < _NONCE_BYTES + 16:
            raise UnreadableRecord("corrupt", "truncated")
        if key_id not in self._keys:
            raise UnreadableRecord("unknown encryption key")
        cipher = self._aesgcm(self._derive(key_id, session_key))
        try:
            nonce, ciphertext = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
            return cipher.decrypt(nonce, ciphertext, header + session_key)
        except self._invalid:
            raise UnreadableRecord("corrupt", "does not decrypt") from None
