"""What Postfix asks, word for word."""

REQUEST = (
    "request=smtpd_access_policy\nprotocol_state={state}\nprotocol_name=ESMTP\nclient_address=127.0.0.5\nclient_name=unknown\n"
    "client_port={port}\nreverse_client_name=unknown\nserver_address=127.0.0.1\nserver_port=587\nhelo_name=client.test\n"
    "sender={login}\nrecipient={recipient}\nrecipient_count=0\nqueue_id=\ninstance={instance}\nsize=0\netrn_domain=\n"
    "stress=\nsasl_method=PLAIN\nsasl_username={login}\nsasl_sender=\nccert_subject=\nccert_issuer=\nccert_fingerprint=\n"
    "ccert_pubkey_fingerprint=\nencryption_protocol=TLSv1.3\nencryption_cipher=TLS_AES_256_GCM_SHA384\n"
    "encryption_keysize=256\npolicy_context=\n\n"
)
"""As Postfix 3.7 sends it."""


PORT = 40302


def question(
    login: str, recipient: str = "x@example.org", *, instance: str = "", state: str = "RCPT", port: int | str = PORT
) -> bytes:
    return REQUEST.format(login=login, recipient=recipient, instance=instance, state=state, port=port).encode()


CONNECT = question("", "", state="CONNECT")
"""Which Postfix asks before any other."""
