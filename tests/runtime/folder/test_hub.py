"""Loading from the Hub: the real client, against the server of conftest.py."""

import logging
import shutil
import subprocess
import threading
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from meam_policy import ConfigError, FormatError, HubError, IntegrityError, NotFoundError
from meam_policy.folder import hub as hub_module
from meam_policy.folder import policy_folder
from meam_policy.folder.hub_names import is_ref_name
from meam_policy.folder.policy_folder import POLICY_FILES

REPO = "robots/pockets"
SHA, OTHER_SHA = "a1" * 20, "b2" * 20
TOKEN = "hf_thisisnotarealtokenbutitissecret"
OBSERVATION = np.array([0.5, -0.25, 1.0])


def hub_error(load, *arguments, **keywords):
    """The HubError of a load, after checking that nothing of the token shows in it or its causes."""
    with pytest.raises(HubError) as caught:
        load(*arguments, token=TOKEN, **keywords)
    text = "".join(traceback.format_exception(caught.value))
    assert TOKEN not in text
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
    return caught.value


def acts_like(policy, linear):
    np.testing.assert_array_equal(policy.act(OBSERVATION, deterministic=True), linear.chunks([OBSERVATION])[0, 0])
    return True


def test_policy_from_the_hub_acts_like_the_one_in_the_folder(load, linear):
    ours, theirs = linear.load(seed=0), load(seed=0)
    assert theirs.spec == ours.spec
    for _ in range(5):
        np.testing.assert_array_equal(theirs.act(OBSERVATION), ours.act(OBSERVATION))


def test_only_the_files_of_a_policy_are_requested(load, hub):
    load()
    requested = {path.split("/")[-1] for _, path, _ in hub.requests if "/resolve/" in path}
    assert requested <= set(POLICY_FILES)
    assert hub.downloads() == {"config.json": 1, "policy.onnx": 1, "README.md": 1}


def test_token_is_sent_to_the_hub(load, hub):
    load(token=TOKEN)
    sent = {authorization for _, path, authorization in hub.requests if REPO in path}  # the client asks for more, once
    assert sent == {f"Bearer {TOKEN}"}


def test_second_load_downloads_nothing(load, hub, linear):
    load()
    hub.requests.clear()
    assert acts_like(load(), linear)
    assert hub.downloads() == {}


def test_branch_that_moved_is_downloaded_again(load, hub, make_policy):
    load()
    newer = make_policy(weight=np.ones((3, 8)) / 8)
    hub.commits[OTHER_SHA] = {path.name: path.read_bytes() for path in newer.folder.iterdir()}
    hub.refs["main"] = OTHER_SHA
    assert acts_like(load(), newer)


def test_revision_chooses_the_commit(load, hub, linear, make_policy):
    newer = make_policy(weight=np.ones((3, 8)) / 8)
    hub.commits[OTHER_SHA] = {path.name: path.read_bytes() for path in newer.folder.iterdir()}
    hub.refs["main"] = OTHER_SHA
    for revision, expected in (("v1", linear), (SHA, linear), (OTHER_SHA, newer), ("main", newer), (None, newer)):
        assert acts_like(load(revision=revision), expected)


def test_pinned_commit_needs_no_server_once_it_is_cached(load, hub, linear):
    load(revision=SHA)
    hub.requests.clear()
    hub.fault = "500"
    assert acts_like(load(revision=SHA), linear)
    assert hub.requests == []
    hub.stop()
    assert acts_like(load(revision=SHA), linear)


def test_commit_cached_through_a_branch_needs_no_server_either(load, hub, linear):
    load()
    hub.stop()
    assert acts_like(load(revision=SHA), linear)


def test_local_files_only_makes_no_request(load, hub, linear):
    load()
    hub.requests.clear()
    assert acts_like(load(local_files_only=True), linear)
    assert hub.requests == []


def test_local_files_only_without_a_cache_is_offline(load, hub):
    error = hub_error(load, local_files_only=True)
    assert error.kind == "offline"
    assert REPO in str(error)
    assert hub.requests == []


@pytest.mark.parametrize("fault", ["500", "503", "portal"])
def test_cached_branch_is_used_with_a_warning_when_the_server_fails(load, hub, linear, fault):
    load()
    hub.fault = fault
    with pytest.warns(UserWarning, match=f"Using commit {SHA} from the cache") as caught:
        policy = load()
    assert len(caught) == 1
    assert acts_like(policy, linear)


def test_cached_branch_is_used_with_a_warning_when_the_server_is_gone(load, hub, linear):
    load()
    hub.stop()
    with pytest.warns(UserWarning, match=SHA) as caught:
        assert acts_like(load(), linear)
    expected = f"The Hub cannot be reached for {REPO}. Using commit {SHA} from the cache."
    assert [str(warning.message) for warning in caught] == [expected]


@pytest.mark.parametrize("arguments", [{}, {"revision": "v1"}, {"revision": SHA}, {"variant": "k3"}])
def test_offline_environment_loads_silently_from_the_cache(load, hub, variants, monkeypatch, arguments):
    load(**arguments)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(**arguments).variant == arguments.get("variant")
    assert hub.requests == []


def test_offline_environment_without_a_cache_is_named(load, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = hub_error(load)
    assert error.kind == "offline"
    assert "not in the local cache, and HF_HUB_OFFLINE in the environment forbids to ask the Hub" in str(error)
    assert "local_files_only=True forbids" in str(hub_error(load, local_files_only=True))
    assert hub.requests == []


def test_offline_environment_never_replaces_a_forced_download(load, hub, monkeypatch):
    load()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub_error(load, force_download=True).kind == "offline"


def test_force_download_never_falls_back_to_the_cache(load, hub):
    load()
    load(force_download=True)
    assert hub.downloads()["policy.onnx"] == 2
    hub.fault = "503"
    assert hub_error(load, force_download=True).kind == "server"


@pytest.mark.parametrize("status", [401, 404])
def test_missing_or_private_repository_is_an_access_error(load, hub, status):
    hub.missing_status = status
    error = hub_error(load, "robots/typo")
    assert error.kind == "access"
    for fragment in ("robots/typo", "missing, private, or the token lacks access"):
        assert fragment in str(error)


def test_gated_repository_is_an_access_error_with_the_page_to_ask_on(load, hub):
    hub.fault = "gated"
    error = hub_error(load)
    assert error.kind == "access"
    assert f"{hub.url}/{REPO}" in str(error)


@pytest.mark.parametrize("fault", ["bad token", "401", "403"])
def test_refused_token_is_an_access_error(load, hub, fault):
    hub.fault = fault
    error = hub_error(load)
    assert error.kind == "access"
    assert "token" in str(error)


def test_access_errors_do_not_fall_back_to_the_cache(load, hub):
    load()
    hub.fault = "gated"
    assert hub_error(load).kind == "access"


@pytest.mark.parametrize("revision", ["no-such-branch", "c3" * 20])
def test_unknown_revision_is_an_access_error_that_names_it(load, revision):
    error = hub_error(load, revision=revision)
    assert error.kind == "access"
    assert f"no revision '{revision}'" in str(error)


NO_NAMES = (
    *("", " ", "a b", "a..b", "a\tb", "a\x7fb", "a~b", "a^b", "a:b", "a?b", "a*b", "a[b", "a\\b", "a@{b", "@", "a//b"),
    *("/a", "a/", ".a", "a/.b", "a.", "a.lock", "a.lock/b", "-a", "a\n", "a\udcff"),
)
NAMES = (
    *("a", "v1.2", "a/b", "a@b", "@a", "a-", "a/-b", "a.lockb", "a{b", "a.b/c", "a|b", "über", "a\u2028b"),
    *("refs/pr/1", SHA),
)


@pytest.mark.parametrize("name", [*NO_NAMES, *NAMES])
def test_what_a_branch_may_be_called_is_what_git_says(name):
    allowed = is_ref_name(name)
    assert allowed == (name in NAMES)
    if shutil.which("git") and name and not name.startswith("-"):  # as a tag git refuses that dash, but not here
        git = ["git", "check-ref-format", "--allow-onelevel"]
        told = subprocess.run([*git, name.encode("utf-8", "surrogateescape")], check=False).returncode == 0
        assert allowed == (told and "\udcff" not in name)


@pytest.mark.parametrize("revision", ["", "a b", "a..b", "v1.lock", "\udcff"])
def test_a_revision_that_git_does_not_allow_is_refused_without_a_request(load, hub, revision):
    with pytest.raises(ConfigError, match="The revision is '.*', a name that git does not allow; expected a branch"):
        load(revision=revision)
    assert hub.requests == []


def test_a_token_that_cannot_be_sent_is_named_and_kept_to_itself(load, hub, monkeypatch):
    for arguments in ({"token": "hf_secr\xe9t"}, {"token": None}):
        monkeypatch.setenv("HF_TOKEN", "hf_secr\xe9t")
        with pytest.raises(HubError, match=r"has a character that cannot be sent; expected printable ASCII") as caught:
            load(**arguments)
        assert caught.value.kind == "access"
        assert "secr" not in "".join(traceback.format_exception(caught.value))
    assert hub.requests == []
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    load()  # none is sent


def test_a_cached_commit_needs_no_token_that_can_be_sent(load, hub, linear):
    load(revision=SHA)
    assert acts_like(load(revision=SHA, token="hf_secr\xe9t"), linear)


@pytest.mark.parametrize("repo_id", ["a--b/c", "owner/name.git", "-owner/name", "owner/.."])
def test_repo_id_that_the_hub_forbids_is_an_error_without_a_request(load, hub, repo_id):
    with pytest.raises((HubError, NotFoundError), match=r"neither a folder here|does not exist"):
        load(repo_id)
    assert hub.requests == []


@pytest.mark.parametrize("status", ["500", "503", "429", "404"])
def test_failing_server_is_a_server_error_with_its_status(load, hub, status):
    hub.fault = status
    error = hub_error(load)
    assert error.kind == "server"
    assert status in str(error)
    assert len(hub.requests) <= 2  # it is not asked again and again


def test_captive_portal_is_a_server_error(load, hub):
    hub.fault = "portal"
    assert hub_error(load).kind == "server"


def test_closed_port_is_an_offline_error(load, hub):
    hub.stop()
    error = hub_error(load)
    assert error.kind == "offline"
    assert "cannot be reached" in str(error)


def test_silent_server_is_given_up_within_half_a_minute_by_default(load, hub, monkeypatch):
    default = hub_module.METADATA_TIMEOUT_S
    monkeypatch.setattr(hub_module, "METADATA_TIMEOUT_S", 0.1)
    hub.fault = "silent"
    assert hub_error(load).kind == "timeout"
    assert 0 < len(hub.requests) * default < 30


def test_cached_branch_survives_a_silent_server(load, hub, linear, monkeypatch):
    load()
    monkeypatch.setattr(hub_module, "METADATA_TIMEOUT_S", 0.1)
    hub.fault = "silent"
    with pytest.warns(UserWarning, match=SHA):
        assert acts_like(load(), linear)


@pytest.mark.parametrize("missing", ["config.json", "policy.onnx"])
def test_repository_without_a_policy_is_not_found(load, hub, missing):
    del hub.commits[SHA][missing]
    with pytest.raises(NotFoundError, match="is not a policy"):
        load()


@pytest.mark.slow
def test_connection_that_is_cut_once_is_resumed(load, hub, linear):
    hub.cuts = 1
    assert acts_like(load(), linear)
    assert hub.cuts == 0


@pytest.mark.slow
def test_connection_that_is_always_cut_is_a_server_error_and_leaves_no_policy(load, hub, linear, tmp_path):
    hub.cuts = 10**6
    error = hub_error(load)
    assert error.kind == "server"
    assert "RemoteProtocolError" in str(error)
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    assert hub_error(load, local_files_only=True).kind == "incomplete"
    hub.cuts = 0
    assert acts_like(load(), linear)


def test_partial_snapshot_is_incomplete_offline_and_completed_online(load, hub, linear, tmp_path):
    load()
    for path in (tmp_path / "cache").rglob("snapshots/*/policy.onnx"):
        path.resolve().unlink()
        path.unlink()
    for revision in (None, SHA):
        error = hub_error(load, local_files_only=True, revision=revision)
        assert error.kind == "incomplete"
        assert "policy.onnx is missing, of an interrupted download" in str(error)
    assert acts_like(load(), linear)


@pytest.mark.parametrize("change", [lambda data: data[:-10], lambda data: data[:-1] + b"?"])
def test_file_damaged_on_the_way_is_an_integrity_error(load, hub, change):
    hub.commits[SHA]["policy.onnx"] = change(hub.commits[SHA]["policy.onnx"])
    with pytest.raises(IntegrityError, match=r"policy\.onnx"):
        load()


def test_pickle_in_place_of_the_config_is_a_format_error(load, hub):
    hub.commits[SHA]["config.json"] = b"\x80\x04\x95"
    with pytest.raises(FormatError, match=r"config\.json"):
        load()


def test_loading_prints_nothing_to_stdout(load, capfd):
    load()
    assert capfd.readouterr().out == ""


def test_nothing_is_written_outside_the_cache(load, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    load()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "work"]
    assert list(Path().iterdir()) == []


def test_that_a_name_was_taken_for_a_repository_is_logged_once(load, caplog):
    policy_folder._log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="meam_policy"):
        load()
        load()
    (record,) = [record for record in caplog.records if record.name.startswith("meam_policy")]
    assert record.getMessage() == f"{REPO} is the repository on the Hub, at commit {SHA}; there is no such folder here."


def test_two_threads_loading_the_same_repository_both_succeed(load, linear):
    policies = []
    threads = [threading.Thread(target=lambda: policies.append(load())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(policies) == 2
    assert all(acts_like(policy, linear) for policy in policies)


@pytest.fixture
def variants(hub, linear, make_policy):
    """What the variants in the repository compute, by name: not what the policy does, nor each other."""
    computed = {name: make_policy(weight=np.full((3, 8), scale)) for name, scale in (("k1", 0.25), ("k3", -0.25))}
    for name, policy in computed.items():
        linear.add_variant(name, policy.graph)
    hub.commits[SHA] |= {path.name: path.read_bytes() for path in linear.folder.iterdir()}
    return computed


def test_variant_from_the_hub_acts_like_its_graph(load, variants, linear):
    assert acts_like(load(variant="k3"), variants["k3"])
    assert acts_like(load(variant="k1"), variants["k1"])
    assert acts_like(load(), linear)


def test_only_the_graph_of_the_asked_for_variant_is_downloaded_besides_the_policy(load, hub, variants):
    load(variant="k3")
    requested = {path.split("/")[-1] for _, path, _ in hub.requests if "/resolve/" in path}
    assert requested == {*POLICY_FILES, "k3.onnx"}
    assert hub.downloads() == {"config.json": 1, "policy.onnx": 1, "README.md": 1, "k3.onnx": 1}


def test_no_variant_is_downloaded_for_the_policy_itself(load, hub, variants):
    load()
    assert hub.downloads() == {"config.json": 1, "policy.onnx": 1, "README.md": 1}


@pytest.mark.parametrize("moves_after", ["config.json", "policy.onnx", "README.md"])
def test_variant_is_of_the_commit_of_config_json_even_if_the_branch_moves(
    load, hub, variants, make_policy, moves_after
):
    newer = make_policy(weight=-np.ones((3, 8)) / 8)
    newer.add_variant("k3", newer.graph)
    hub.commits[OTHER_SHA] = {path.name: path.read_bytes() for path in newer.folder.iterdir()}
    hub.after[moves_after] = lambda: hub.refs.update(main=OTHER_SHA)
    assert acts_like(load(variant="k3"), variants["k3"])
    assert hub.refs["main"] == OTHER_SHA
    (downloaded,) = [path for method, path, _ in hub.requests if method == "GET" and path.endswith("k3.onnx")]
    assert f"/{SHA}/" in downloaded
    assert acts_like(load(variant="k3"), newer)


def test_pinned_variant_needs_no_server_once_it_is_cached(load, hub, variants):
    load(revision=SHA, variant="k3")
    hub.requests.clear()
    assert acts_like(load(revision=SHA, variant="k3"), variants["k3"])
    assert acts_like(load(revision=SHA, variant="k3", local_files_only=True), variants["k3"])
    assert hub.requests == []
    hub.stop()
    assert acts_like(load(revision=SHA, variant="k3"), variants["k3"])


def test_cached_variant_is_used_with_one_warning_when_the_server_fails(load, hub, variants):
    load(variant="k3")
    hub.fault = "503"
    with pytest.warns(UserWarning, match=f"Using commit {SHA} from the cache") as caught:
        policy = load(variant="k3")
    assert len(caught) == 1
    assert acts_like(policy, variants["k3"])


def test_variant_that_is_not_cached_is_incomplete_without_a_network(load, hub, variants):
    load(revision=SHA, variant="k3")
    hub.requests.clear()
    assert hub_error(load, revision=SHA, variant="k1", local_files_only=True).kind == "incomplete"
    assert hub.requests == []
    assert acts_like(load(revision=SHA, variant="k1"), variants["k1"])


def test_variant_whose_graph_the_repository_lacks_is_not_found_by_name(load, hub, variants):
    del hub.commits[SHA]["k3.onnx"]
    with pytest.raises(NotFoundError) as caught:
        load(variant="k3")
    assert str(caught.value) == (
        f"{REPO} at commit {SHA} lacks one of the files that its config.json names: k3.onnx. "
        "Upload the whole policy folder again."
    )
    assert acts_like(load(variant="k1"), variants["k1"])


def test_unknown_variant_is_refused_with_the_known_ones_and_downloads_nothing_for_it(load, hub, variants):
    with pytest.raises(ConfigError, match='no variant "k9"; it has: k1, k3'):
        load(variant="k9")
    assert set(hub.downloads()) == {"config.json", "policy.onnx", "README.md"}


def damage(folder, name):
    (cached,) = folder.rglob(f"snapshots/*/{name}")
    data = cached.read_bytes()
    cached.resolve().write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("name", ["config.json", "policy.onnx", "k3.onnx", "README.md"])
@pytest.mark.parametrize("revision", [None, SHA])
def test_a_file_damaged_in_the_cache_heals_itself(load, hub, variants, tmp_path, name, revision):
    load(revision=revision, variant="k3")
    damage(tmp_path / "cache", name)
    hub.requests.clear()
    assert acts_like(load(revision=revision, variant="k3"), variants["k3"])
    if revision is None or name != "README.md":  # a pinned commit is not asked for what acting does without
        assert hub.downloads() == {name: 1}
    hub.requests.clear()
    assert acts_like(load(revision=revision, variant="k3"), variants["k3"])
    assert hub.downloads() == {}


def test_a_file_damaged_in_the_cache_is_an_integrity_error_without_a_network(load, variants, tmp_path):
    load(variant="k3")
    damage(tmp_path / "cache", "k3.onnx")
    for arguments in ({"local_files_only": True}, {"local_files_only": True, "revision": SHA}):
        with pytest.raises(IntegrityError, match=r"k3\.onnx"):
            load(variant="k3", **arguments)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(hub_module, "METADATA_TIMEOUT_S", 0.3)
    monkeypatch.setattr(hub_module, "ANSWER_DEADLINE_S", 0.6)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)


def newer_commit(hub, make_policy):
    newer = make_policy(weight=np.ones((3, 8)) / 8)
    hub.commits[OTHER_SHA] = {path.name: path.read_bytes() for path in newer.folder.iterdir()}
    hub.refs["main"] = OTHER_SHA
    return newer


STALLS = {
    "in the first header": lambda hub: setattr(hub, "fault", "drip"),
    "in a later header": lambda hub: hub.after.update({"config.json": lambda: setattr(hub, "fault", "drip")}),
    "before a later answer": lambda hub: hub.after.update({"config.json": lambda: setattr(hub, "fault", "silent")}),
    "in the middle of config.json": lambda hub: hub.stalled.add("config.json"),
    "in the middle of policy.onnx": lambda hub: hub.stalled.add("policy.onnx"),
}


@pytest.mark.parametrize("where", STALLS)
def test_a_hub_that_stalls_is_given_up_and_the_last_commit_is_used(load, hub, linear, make_policy, impatient, where):
    load()
    newer = newer_commit(hub, make_policy)
    STALLS[where](hub)
    start = time.monotonic()
    with pytest.warns(UserWarning, match=f"Using commit {SHA} from the cache"):
        assert acts_like(load(), linear)
    assert time.monotonic() - start < 10
    # Nothing is forgotten: without a network, too, there is a whole policy.
    assert acts_like(load(local_files_only=True), linear)
    hub.fault, hub.after, hub.stalled = "", {}, set()
    hub.released.set()
    assert acts_like(load(), newer)
    assert acts_like(load(local_files_only=True), newer)


@pytest.mark.parametrize("where", STALLS)
def test_a_hub_that_stalls_is_a_timeout_where_nothing_is_cached(load, hub, impatient, where):
    STALLS[where](hub)
    start = time.monotonic()
    error = hub_error(load)
    assert error.kind == "timeout"
    assert "within 0.6 s, then 1.2 s for each file" in str(error)
    assert "HF_HUB_DOWNLOAD_TIMEOUT" in str(error)
    assert time.monotonic() - start < 10


def test_the_longest_waits_are_those_of_the_documentation(monkeypatch):
    monkeypatch.undo()
    assert hub_module.ANSWER_DEADLINE_S == 30
    assert hub_module.FILE_DEADLINE_SILENCES * constants.HF_HUB_DOWNLOAD_TIMEOUT == 120


def test_latency_budget_downloads_variants_only_until_one_keeps_it(load, hub, variants, linear, monkeypatch):
    with pytest.raises(ConfigError, match="at most one"):
        load(variant="k3", latency_budget_ms=1)
    assert hub.requests == []
    for error, name in enumerate(variants, 1):
        linear.add_variant(name, variants[name].graph, measured={"action_error": error})
    hub.commits[SHA] |= {path.name: path.read_bytes() for path in linear.folder.iterdir()}
    times = {None: 9.0, "k1": 1.0}
    monkeypatch.setattr("meam_policy.inference.latency.answer_time_ms", lambda policy: times[policy.variant])
    assert load(latency_budget_ms=10).variant is None
    assert set(hub.downloads()) == {"config.json", "policy.onnx", "README.md"}
    assert acts_like(load(latency_budget_ms=2), variants["k1"])
    assert set(hub.downloads()) == {"config.json", "policy.onnx", "README.md", "k1.onnx"}


CODE = """
import sys
from meam_policy import HubError, MeamPolicy
try:
    policy = MeamPolicy.from_pretrained(sys.argv[1], cache_dir=sys.argv[2])
    print(policy.act([0.5, -0.25, 1.0], deterministic=True).tolist())
except HubError as error:
    print(error.kind)
"""


@pytest.mark.slow
def test_offline_environment_variable_is_respected(load, hub, linear, run_python, tmp_path):
    environment = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}
    empty = run_python("-c", CODE, REPO, str(tmp_path / "cache"), **environment)
    assert empty.stdout == "offline\n", empty.stderr
    load()
    hub.requests.clear()
    full = run_python("-c", CODE, REPO, str(tmp_path / "cache"), **environment)
    assert full.stdout == f"{linear.chunks([OBSERVATION])[0, 0].tolist()}\n"
    assert full.stderr == ""
    assert hub.requests == []


def test_no_other_warning_is_given(load):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load()
        load()
