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
        ("https:/me:pw@host/x is no file", "https:/host/x is no file"),
        ("s3:/key:secret@bucket/x", "s3:/bucket/x"),
        ("cannot read:/tmp/a@b/x", "cannot read:/tmp/a@b/x"),
        ("https://host/path@v2/x.tar", "https://host/path@v2/x.tar"),
        ("token: 5, key=7", "token: 5, key=7"),
        ("pipe:curl -H 'Authorization: Bearer abc' https://u:p@h/x", "pipe:curl -H 'Authorization: ...' https://h/x"),
        ('pipe:curl --header "X-Api-Key: abc" h', 'pipe:curl --header "X-Api-Key: ..." h'),
        ("pipe:curl -u me:pw https://h/x", "pipe:curl -u ... https://h/x"),
        ("pipe:curl --user=me:pw https://h/x", "pipe:curl --user=... https://h/x"),
        ("pipe:AWS_SECRET_ACCESS_KEY=abc aws s3 cp s3://b/x -", "pipe:AWS_SECRET_ACCESS_KEY=... aws s3 cp s3://b/x -"),
        ("pipe:gcat --token abc x.tar", "pipe:gcat --token ... x.tar"),
        ("pipe:cat tokens.tar", "pipe:cat tokens.tar"),
        ("https://me:p/w@host/x", "https://host/x"),
        ("https://host:80/pkg@1.0/x", "https://host:80/pkg@1.0/x"),
        (r"https:\/\/me:pw@h\/x", r"https:\/\/h\/x"),
        ("https://h/x;token=abc", "https://h/x;..."),
        ("login with hf_abcdefghijk failed", "login with hf_... failed"),
        ("pipe:curl -H 'X-Auth: abc' https://h/x", "pipe:curl -H '...' https://h/x"),
        ("pipe:curl -b 'session=abc' https://h/x", "pipe:curl -b '...' https://h/x"),
        ("pipe:curl -su me:pw https://h/x", "pipe:curl -s... ... https://h/x"),
        ("pipe:curl --oauth2-bearer abc https://h/x", "pipe:curl --oauth2-bearer ... https://h/x"),
        ("pipe:gpg --passphrase pw -d /x.gpg", "pipe:gpg --passphrase ... -d /x.gpg"),
        ("pipe:sshpass -p pw ssh h cat /x", "pipe:sshpass -p ... ssh h cat /x"),
        ("pipe:sshpass -ppw ssh h cat /x", "pipe:sshpass -p... ... h cat /x"),
        ("pipe:openssl enc -d -k pw -in /x", "pipe:openssl enc -d -k ... -i... /x"),
        (
            "pipe:cat /x.tar: exit code 1. Pass --data.train FOLDER",
            "pipe:cat /x.tar: exit code 1. Pass --data.train FOLDER",
        ),
        (
            "'pipe:aws s3 cp s3://b/c-{0..3}.tar -': ended with 1: token=5",
            "'pipe:aws s3 cp s3://b/c-{0..3}.tar -': ended with 1: token=5",
        ),
        ("https://h/micro_batch_tokens=4", "https://h/micro_batch_tokens=4"),
    ],
)
def test_secrets_are_hidden(text, shown):
    assert redact(text) == shown
    assert redact(shown) == shown


def test_nested_values_are_redacted():
    value = {"train": [{"shards": "https://u:p@h/x", "weight": 2.0}], "name": ("https://t@h/", None)}
    assert redact_all(value) == {"train": [{"shards": "https://h/x", "weight": 2.0}], "name": ["https://h/", None]}
