"""Texts that are printed or written to files hold no secrets of URLs and commands."""

import pytest

from megabert.files.redact import redact, redact_all


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host:80/x.tar is missing", "https://host:80/x.tar is missing"),
        ("s3://key:secret@bucket/x-{0..3}.tar", "s3://bucket/x-{0..3}.tar"),
        ("hdfs://t0ken@host/x: 404", "hdfs://host/x: 404"),
        ("a https://h/x.tar?sig=abc&se=1 b", "a https://h/x.tar?... b"),
        ("('https://h/x?X-Amz-Signature=ab', 2)", "('https://h/x?...', 2)"),
        ("http://u:p@h/a and http://v:q@h/b#t", "http://h/a and http://h/b#..."),
        ("https://host/path@v2/x.tar", "https://host/path@v2/x.tar"),
        ("token: 5, key=7", "token: 5, key=7"),
        ("pipe:curl -H 'Authorization: Bearer abc' https://u:p@h/x", "pipe:curl -H 'Authorization: ...' https://h/x"),
        ('pipe:curl --header "X-Api-Key: abc" h', 'pipe:curl --header "X-Api-Key: ..." h'),
        ("pipe:curl -u me:pw https://h/x", "pipe:curl -u ... https://h/x"),
        ("pipe:curl --user=me:pw https://h/x", "pipe:curl --user=... https://h/x"),
        ("pipe:AWS_SECRET_ACCESS_KEY=abc aws s3 cp s3://b/x -", "pipe:AWS_SECRET_ACCESS_KEY=... aws s3 cp s3://b/x -"),
        ("pipe:gcat --token abc x.tar", "pipe:gcat --token ... x.tar"),
        ("pipe:cat tokens.tar", "pipe:cat tokens.tar"),
    ],
)
def test_secrets_are_hidden(text, shown):
    assert redact(text) == shown


def test_nested_values_are_redacted():
    value = {"train": [{"shards": "https://u:p@h/x", "weight": 2.0}], "name": ("https://t@h/", None)}
    assert redact_all(value) == {"train": [{"shards": "https://h/x", "weight": 2.0}], "name": ["https://h/", None]}
