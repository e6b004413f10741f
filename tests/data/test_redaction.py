"""What is private in a URL isn't in what is written or said; everything else is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.fault import Fault
from data.redaction import is_private, redacted, redacted_settings

WORD = st.from_regex(r"[A-Za-z0-9%+/_.~-]{0,6}[A-Za-z0-9]{6}", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@host/a", "https://***@host/a"),
        ("https://me:p@ss@host:8080/a", "https://***@host:8080/a"),
        ("https://ghp_123@host/a", "https://***@host/a"),
        ("s3://key:secret@bucket/a", "s3://***@bucket/a"),
        ("https:/me:pass@host/a", "https:/***@host/a"),
        ("simplecache::https://me:pass@host/a", "simplecache::https://***@host/a"),
        ("https://h/a?token=x", "https://h/a?token=***"),
        ("https://h/a?X-Amz-Signature=a/b+c==&sig=%2Bd", "https://h/a?X-Amz-Signature=***&sig=***"),
        ("https://h/a?token=x&sig=y", "https://h/a?token=***&sig=***"),
        ("https://h/a?abcdef", "https://h/a?***"),
        (
            "https://h/a?token=x is refused (https://h/a?token=x).",
            "https://h/a?token=*** is refused (https://h/a?token=***).",
        ),
        ("data.shards=[https://h/a?t=x,s3://k:s@b/c?t=y]", "data.shards=[https://h/a?t=***,s3://***@b/c?t=***]"),
        ("https://bob:s3cr'et@h.invalid/shards", "https://***@h.invalid/shards"),
        ("https://bob:a/b@h/x", "https://***@h/x"),
        ("HTTP://u@h/x", "HTTP://***@h/x"),
        ("https://h/x#access_token=abc", "https://h/x#access_token=***"),
        ("{'url': 'https://h/a?t=x', 'n': 1}", "{'url': 'https://h/a?t=***', 'n': 1}"),
        ("trainer.loggers=[{_target_:x.L,api_key:S3cret}]", "trainer.loggers=[{_target_:x.L,api_key:***}]"),
        ("'a.loggers=[{api_key:a,token:b}]'", "'a.loggers=[{api_key:***,token:***}]'"),
        ("{'_target_': 'x', 'password': 'it\\'s', 'n': 1}", "{'_target_': 'x', 'password': '***', 'n': 1}"),
        ('"clientSecret": "a b", "n": 3', '"clientSecret": "***", "n": 3'),
        ("  api_key: my secret words  # mine", "  api_key: ***  # mine"),
        ("[{_target_: x, auth_token: a b, n: 1}]", "[{_target_: x, auth_token: ***, n: 1}]"),
        ("L(api_key=abc) failed; password=1234.", "L(api_key=***) failed; password=***."),
        ("x.credentials=[a,b] y.credentials={user:a,pass:b}", "x.credentials=*** y.credentials=***"),
    ],
)
def test_what_is_private_is_hidden_and_nothing_else(text: str, shown: str) -> None:
    assert redacted(text) == shown and is_private(text)
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "https://host:8080/a/b@c", "abfs://container@account.dfs.core.windows.net/a", "hf://datasets/a/b@main/c", "hf-hub:a/b",
        "a@b.c", "runs/first?", "mpp=0.5", "C:/a", "launch.time=2-00:00:00", "https://h/a?token=${oc.env:TOKEN}",
        "https://${oc.env:ME}:${oc.env:PASS}@host/a", "data.shards='https://h/a?t=${oc.env:A}&u=${oc.env:B}'", "", "file:///a/b",
        "api_key:${oc.env:KEY}", "api_key='${oc.env:KEY}'", "api_key=null", "data.batch_tokens=4096", "class_token: true", "token=5",
        "it holds a password or a token: take it out", "mask_token: zeros", "keys=a", "monkey=a", "data.members.token.shards=a",
    ],
)  # fmt: skip
def test_what_is_not_private_stays(text: str) -> None:
    assert redacted(text) == text and not is_private(text)


@given(WORD, WORD, st.sampled_from(["{}", "'{}'", "({})", "see {}: it's gone", "[{},b]", '{{"a": "{}"}}', "{}."]))
def test_no_secret_is_seen_in_any_sentence(user: str, token: str, sentence: str) -> None:
    said = redacted(
        sentence.format(f"https://{user.replace('/', '')}:{token.replace('/', '')}@host/f?a=1&signature={token}")
    )
    assert token not in said and "host/f?a=***&signature=***" in said


def test_settings_keep_their_shape_and_lose_their_secrets() -> None:
    private = {
        "data": {"shards": ["https://h/a?t=x"], "size": 3, "members": {"a": {"shards": ("s3://k:s@b",)}}},
        "init": None,
    }
    assert redacted_settings(private) == {
        "data": {"shards": ["https://h/a?t=***"], "size": 3, "members": {"a": {"shards": ("s3://***@b",)}}},
        "init": None,
    }


def test_what_is_named_a_secret_is_hidden_whatever_it_is_and_counts_are_not() -> None:
    private = {
        "api_key": "a",
        "password": 7,
        "comet": [{"apiKey": "b", "credentials": {"user": "c"}, "auth": ("d", "e")}],
    }
    assert redacted_settings(private) == {
        "api_key": "***",
        "password": "***",
        "comet": [{"apiKey": "***", "credentials": "***", "auth": "***"}],
    }
    open_to_all = {
        "batch_tokens": 4096, "max_token": 5, "class_token": True, "mask_token": "zeros", "api_key": None, "secret": "${oc.env:A}",
        "token": {"shards": "a"}, "password": "***", "key": "x", "author": "me", "password_file": "x",
    }  # fmt: skip
    assert redacted_settings(open_to_all) == open_to_all


def test_no_fault_tells_a_secret() -> None:
    fault = Fault("https://me:pass@h/a?t=abcdef is gone", trace="in f('https://h/a?t=abcdef')\n")
    assert str(fault) == "https://***@h/a?t=*** is gone" and fault.trace == "in f('https://h/a?t=***')\n"
    assert "abcdef" not in repr(fault.args)
