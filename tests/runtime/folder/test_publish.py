"""Publishing on the Hub: the real client, against the server of conftest.py."""

import dataclasses
import json
import logging
import pickle
import time
import traceback
from typing import Any

import numpy as np
import pytest
from huggingface_hub import constants

from meam_policy import (
    ConfigError,
    FormatError,
    HubError,
    IntegrityError,
    MeamError,
    MeamPolicy,
    NotFoundError,
    PolicySpec,
)
from meam_policy.cli import run
from meam_policy.folder import patience, publish
from meam_policy.folder.policy_folder import sha256

REPO = "robots/pockets"
NEW = "robots/arm"
SHA = "a1" * 20
TOKEN = "hf_thisisnotarealtokenbutitissecret"
OBSERVATION = np.array([0.5, -0.25, 1.0])
CARD = b"---\nlicense: apache-2.0\nlibrary_name: meam-policy\n---\n# Pockets\n"
FILES = ("config.json", "policy.onnx", "k3.onnx", "model.safetensors", "README.md", "ladder.png")


@pytest.fixture
def whole(make_policy):
    """Make a policy folder with a variant, weights, a figure and a card, beside files that are nobody's business."""

    def make(**arguments):
        made = make_policy(**arguments)
        made.add_variant("k3", make_policy(weight=np.full((3, 8), -0.25)).graph)
        weights = (2).to_bytes(8, "little") + b"{}"
        spec = PolicySpec.from_json((made.folder / "config.json").read_bytes())
        spec = dataclasses.replace(spec, files={**spec.files, "model.safetensors": sha256(weights)})
        (made.folder / "config.json").write_text(spec.to_json())
        (made.folder / "model.safetensors").write_bytes(weights)
        (made.folder / "README.md").write_bytes(CARD)
        (made.folder / "ladder.png").write_bytes(b"\x89PNG")
        (made.folder / ".env").write_text("HF_TOKEN=hf_secret")
        (made.folder / "notes.txt").write_text("mine")
        (made.folder / "__pycache__").mkdir()
        (made.folder / "__pycache__" / "x.pyc").write_bytes(b"x")
        (made.folder / "link").symlink_to("/etc/hostname")
        return made

    return make


@pytest.fixture
def made(whole):
    return whole()


@pytest.fixture
def push(hub, made):
    def push(repo_id=NEW, folder=made.folder, **arguments):
        return MeamPolicy.from_pretrained(folder).push_to_hub(repo_id, **{"token": TOKEN, **arguments})

    return push


def refused(error, push, *arguments, **keywords) -> Any:
    """The error of a push, after checking that nothing of the token shows in it or its causes."""
    with pytest.raises(error) as caught:
        push(*arguments, **keywords)
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert "\n" not in str(caught.value)
    return caught.value


def contents(folder, names=FILES):
    return {name: (folder / name).read_bytes() for name in names}


def kinds(hub):
    return [kind for kind, _ in hub.written]


# What is pushed


def test_one_commit_holds_the_files_of_the_policy_and_nothing_else(push, hub, made):
    pushed = push()
    repository = hub.repositories[NEW]
    assert repository.refs["main"] == pushed.commit
    assert kinds(hub) == ["create", "upload", "upload", "upload", "upload", "commit"]
    assert hub.written[-1] == ("commit", sorted(FILES))
    there = repository.commits[pushed.commit]
    assert {name: there[name] for name in FILES} == contents(made.folder)
    assert set(there) == {*FILES, ".gitattributes"}
    assert (pushed.changed, pushed.created, pushed.pull_request, pushed.tag) == (True, True, None, None)
    assert dict(pushed.files) == {name: len(data) for name, data in contents(made.folder).items()}
    assert pushed.url == f"{hub.url}/{NEW}/tree/{pushed.commit}"


def test_what_was_pushed_acts_bit_for_bit_like_the_folder(push, load, made):
    pushed = push()
    for variant in (None, "k3"):
        ours = MeamPolicy.from_pretrained(made.folder, variant=variant, seed=3)
        for revision in (None, pushed.commit):
            theirs = load(NEW, variant=variant, seed=3, revision=revision)
            for _ in range(5):
                assert ours.act(OBSERVATION).tobytes() == theirs.act(OBSERVATION).tobytes()
            ours.reset(seed=3)


def test_a_policy_of_the_hub_is_pushed_on_to_another_repository(push, hub, load):
    push()
    load(NEW).push_to_hub("robots/copy", token=TOKEN)
    there = [hub.repositories[name] for name in (NEW, "robots/copy")]
    ours, theirs = (repository.commits[repository.refs["main"]] for repository in there)
    assert ours == theirs


@pytest.mark.parametrize("name", ["policy.onnx", "README.md", "config.json", "ladder.png"])
def test_a_link_in_place_of_a_file_is_refused(push, hub, made, tmp_path, name):
    outside = tmp_path / "outside"
    (made.folder / name).rename(outside)
    (made.folder / name).symlink_to(outside)
    assert "is a symbolic link to" in str(refused(FormatError, push))
    assert hub.requests == []


@pytest.mark.parametrize("name", [".env", "notes.txt", "pytorch_model.bin"])
def test_a_foreign_file_that_config_json_names_is_refused(push, hub, made, name):
    spec = PolicySpec.from_json((made.folder / "config.json").read_bytes())
    (made.folder / name).write_text("secret")
    spec = dataclasses.replace(spec, files={**spec.files, name: sha256(b"secret")})
    (made.folder / "config.json").write_text(spec.to_json())
    assert f"names {name} among its files" in str(refused(FormatError, push))
    assert hub.requests == []


def test_a_file_changed_or_missing_since_the_export_is_refused(push, hub, made):
    weights = made.folder / "model.safetensors"
    weights.write_bytes(b"changed")
    assert "model.safetensors has SHA-256" in str(refused(IntegrityError, push))
    weights.unlink()
    assert "has no model.safetensors" in str(refused(NotFoundError, push))
    assert hub.requests == []


def test_another_export_in_the_folder_is_refused(hub, made, whole):
    policy = MeamPolicy.from_pretrained(made.folder)
    other = whole(weight=np.ones((3, 8)) / 8)
    for name in FILES:
        (made.folder / name).write_bytes((other.folder / name).read_bytes())
    refused(IntegrityError, policy.push_to_hub, NEW, token=TOKEN)
    assert hub.requests == []


def test_a_policy_without_a_folder_cannot_be_pushed(linear):
    loaded = linear.load()
    made_by_hand = MeamPolicy(loaded.spec, loaded.session)
    with pytest.raises(ConfigError, match="was not made by from_pretrained"):
        made_by_hand.push_to_hub(NEW)


# Where it goes


def test_nothing_is_written_by_a_dry_run(push, hub):
    pushed = push(dry_run=True)
    assert hub.written == []
    assert NEW not in hub.repositories
    assert (pushed.commit, pushed.changed, pushed.created, pushed.dry_run) == (None, True, True, True)
    assert set(pushed.files) == set(FILES)


@pytest.mark.parametrize(("asked", "private"), [(True, True), (False, False), (None, False)])
def test_a_new_repository_is_private_if_asked_for(push, hub, asked, private):
    push(private=asked)
    assert hub.repositories[NEW].private == private


def test_an_existing_public_repository_is_not_taken_for_a_private_one(push, hub):
    error = refused(ConfigError, push, REPO, private=True)
    assert f"{REPO} exists and is public; expected a private one" in str(error)
    assert hub.written == []


def test_an_existing_repository_keeps_its_other_files(push, hub):
    pushed = push(REPO)
    assert not pushed.created
    assert hub.commits[pushed.commit]["run.py"] == b"1/0"


def test_a_branch_is_created_if_needed(push, hub, load):
    pushed = push(REPO, branch="feature/slow")
    assert hub.refs == {"main": SHA, "v1": SHA, "feature/slow": pushed.commit}
    assert load(revision="feature/slow").spec == load(revision=pushed.commit).spec


def test_a_tag_is_put_on_the_commit(push, hub):
    pushed = push(REPO, tag="v2")
    assert hub.repositories[REPO].tags == {"v2": pushed.commit}
    assert push(REPO, tag="v2").commit == pushed.commit
    assert kinds(hub).count("tag") == 1


def test_a_tag_of_another_commit_is_a_conflict_before_any_upload(push, hub):
    hub.repositories[REPO].tags["v2"] = SHA
    error = refused(HubError, push, REPO, tag="v2")
    assert error.kind == "conflict"
    assert f"has a tag v2 already, at commit {SHA}" in str(error)
    assert hub.written == []


def test_a_tag_that_fails_leaves_a_commit_that_the_error_names(push, hub):
    hub.faults["tag"] = "503"
    error = refused(HubError, push, REPO, tag="v2")
    assert f"is committed to {REPO} as {hub.refs['main']}" in str(error)
    hub.faults.clear()
    assert push(REPO, tag="v2").commit == hub.refs["main"]
    assert kinds(hub).count("commit") == 1


def test_a_pull_request_leaves_the_branch_as_it_is(push, hub, load):
    pushed = push(REPO, create_pr=True)
    assert hub.refs["main"] == SHA
    assert hub.refs["refs/pr/1"] == pushed.commit
    assert pushed.pull_request == f"{hub.url}/{REPO}/discussions/1"
    assert load(revision=pushed.commit).spec.variants.keys() == {"k3"}


# Several policies in one repository


def test_policies_in_subfolders_do_not_touch_each_other(push, hub, load, made, whole):
    other = whole(weight=np.ones((3, 8)) / 8)
    push(subfolder="mazes/ant")
    pushed = push(folder=other.folder, subfolder="arm")
    assert set(pushed.files) == {f"arm/{name}" for name in FILES}
    assert pushed.url.endswith(f"/tree/{pushed.commit}/arm")
    for subfolder, source in (("mazes/ant", made), ("arm", other)):
        for variant in (None, "k3"):
            theirs = load(NEW, subfolder=subfolder, variant=variant, seed=1)
            ours = source.load(variant=variant, seed=1)
            assert theirs.act(OBSERVATION).tobytes() == ours.act(OBSERVATION).tobytes()
    requested = {path.split("/resolve/")[1].split("/", 1)[1] for _, path, _ in hub.requests if "/resolve/" in path}
    assert all(name.startswith(("mazes/ant/", "arm/")) for name in requested)


def test_a_subfolder_loads_offline_by_branch_and_by_commit_and_from_a_pickle(push, hub, load, monkeypatch):
    pushed = push(subfolder="ant")
    kept = pickle.dumps(load(NEW, subfolder="ant", seed=2))
    hub.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    first = load(NEW, subfolder="ant", seed=2).act(OBSERVATION)
    again = load(NEW, subfolder="ant", seed=2, revision=pushed.commit).act(OBSERVATION)
    assert first.tobytes() == again.tobytes() == pickle.loads(kept).act(OBSERVATION).tobytes()


def test_a_repository_of_subfolders_is_no_policy_itself_and_names_the_remedy(push, load):
    push(subfolder="ant")
    with pytest.raises(NotFoundError, match="If its policies are in folders, name one by subfolder"):
        load(NEW)
    with pytest.raises(NotFoundError, match="The folder bee of robots/arm on the Hub is not a policy"):
        load(NEW, subfolder="bee")


def test_a_folder_of_policies_on_this_machine_is_read_by_subfolder_too(made):
    loaded = MeamPolicy.from_pretrained(made.folder.parent, subfolder=made.folder.name, seed=0)
    assert loaded.act(OBSERVATION).tobytes() == made.load(seed=0).act(OBSERVATION).tobytes()
    with pytest.raises(NotFoundError, match="nowhere does not exist"):
        MeamPolicy.from_pretrained(made.folder.parent, subfolder="nowhere")


@pytest.mark.parametrize(
    "subfolder", ["", " ", ".", "..", "../x", "a/../b", "/a", "a/", "a//b", "a\\b", "C:x", ".git/a", "a\0", "a\nb", 3]
)
def test_a_subfolder_that_is_no_plain_relative_path_is_refused(push, load, hub, subfolder):
    assert "subfolder is" in str(refused(ConfigError, push, subfolder=subfolder))
    with pytest.raises(ConfigError, match="subfolder is"):
        load(subfolder=subfolder)
    assert hub.requests == []


# Refused before anything is uploaded


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"repo_id": "arm"}, "repo_id is 'arm'"),
        ({"repo_id": "a/b/c"}, "repo_id is"),
        ({"repo_id": None}, "repo_id is None"),
        ({"repo_id": "a--b/c"}, "repo_id is 'a--b/c'; expected"),
        ({"repo_id": "owner/name.git"}, "repo_id is 'owner/name.git'; expected"),
        ({"repo_id": "-owner/name"}, "repo_id is '-owner/name'; expected"),
        ({"branch": ""}, "branch is ''"),
        ({"branch": "a\nb"}, "branch is"),
        ({"branch": "a..b"}, "branch is 'a..b'; expected a name that git allows"),
        ({"branch": "a\u2028b"}, "branch is"),
        ({"branch": "\udcff"}, "branch is"),
        ({"tag": "a b"}, "tag is 'a b'; expected a name that git allows"),
        ({"tag": "-v1"}, "tag is '-v1'"),
        ({"commit_message": "\udcff"}, "commit_message is"),
        ({"subfolder": "\udcff"}, "subfolder is"),
        ({"tag": " "}, "tag is ' '"),
        ({"commit_message": ""}, "commit_message is ''"),
        ({"commit_message": None}, "commit_message is None"),
        ({"private": "yes"}, "private is 'yes'"),
        ({"create_pr": 1}, "create_pr is 1"),
        ({"dry_run": "no"}, "dry_run is 'no'"),
        ({"parent_commit": "main"}, "parent_commit is 'main'"),
        ({"create_pr": True, "tag": "v1"}, "expected one of them"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_without_a_request_and_before_a_file_is_read(
    push, hub, made, arguments, named
):
    (made.folder / "model.safetensors").unlink()
    assert named in str(refused(ConfigError, push, **arguments))
    assert hub.requests == []


def test_without_the_weights_nothing_is_pushed(push, hub, made):
    (made.folder / "model.safetensors").unlink()
    assert "has no model.safetensors, which its config.json names" in str(refused(NotFoundError, push))
    assert hub.requests == []


UNSENDABLE = ["hf_Zq7\u201c", "hf_Zq7\xe9", "hf_Zq7 Zq7", "hf_Zq7\nZq7", "hf_Zq7\udcff"]


@pytest.mark.parametrize("token", UNSENDABLE)
def test_a_token_that_cannot_be_sent_is_refused_before_a_file_is_read_and_not_shown(push, hub, made, token):
    (made.folder / "model.safetensors").unlink()
    error = refused(HubError, push, token=token)
    assert error.kind == "access"
    assert str(error).startswith("The Hub token that was given (token=) has a character that cannot be sent;")
    assert "Zq7" not in "".join(traceback.format_exception(error))
    assert hub.requests == []


def test_an_empty_token_is_called_empty(push, hub):
    assert "(token=) is empty; expected" in str(refused(HubError, push, token=""))
    assert hub.requests == []


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"])
def test_a_token_that_cannot_be_sent_is_named_by_its_variable(push, hub, monkeypatch, variable):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv(variable, " hf_secr\xe9t\n")
    error = refused(HubError, push, token=None)
    assert f"in the variable {variable} has a character that cannot be sent" in str(error)
    assert "set the variable to it" in str(error)
    assert hub.requests == []


@pytest.mark.parametrize("stored", ["hf_secr\xe9t".encode(), b"hf_secr\xfft", b"hf_sec\0ret"])
def test_a_token_that_cannot_be_sent_is_named_by_its_file(push, hub, monkeypatch, tmp_path, stored):
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "token").write_bytes(stored)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    error = refused(HubError, push, token=None)
    assert f"in the file {tmp_path / 'token'} has a character that cannot be sent" in str(error)
    assert "`hf auth login`" in str(error)
    assert hub.requests == []


def test_a_token_file_that_cannot_be_read_is_an_access_error(push, hub, monkeypatch, tmp_path):
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path))  # a folder
    error = refused(HubError, push, token=None)
    assert error.kind == "access"
    assert "cannot be read: Is a directory" in str(error)
    assert hub.requests == []


def test_a_token_that_may_only_read_is_refused_before_anything_is_created(push, hub):
    hub.role = "read"
    error = refused(HubError, push)
    assert error.kind == "access"
    assert "may only read" in str(error)
    assert hub.written == []


@pytest.mark.parametrize("token", [None, False])
def test_no_token_is_refused_with_how_to_get_one(push, hub, monkeypatch, token):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    error = refused(HubError, push, token=token)
    assert error.kind == "access"
    assert "hf auth login" in str(error)
    assert hub.written == []


@pytest.mark.parametrize("place", ["whoami", "info", "preupload", "batch"])
@pytest.mark.parametrize("status", ["401", "403"])
def test_a_refused_token_is_an_access_error_and_nothing_is_committed(push, hub, place, status):
    hub.faults[place] = status
    assert refused(HubError, push, REPO).kind == "access"
    assert hub.written == []


def test_the_namespace_of_others_is_an_access_error(push, hub):
    error = refused(HubError, push, "strangers/arm")
    assert error.kind == "access"
    assert "strangers/arm" in str(error)
    assert hub.written == []


@pytest.mark.parametrize("status", ["401", "403", "404", "405", "503"])
def test_a_server_that_cannot_judge_a_card_is_not_taken_for_one_that_refuses_the_token(push, hub, status):
    hub.faults["validate"] = status
    error = refused(HubError, push)
    assert error.kind == "server"
    assert f"{hub.url}/api/validate-yaml answered {status}. Nothing was uploaded" in str(error)
    assert hub.written == []


def test_a_storage_that_refuses_a_file_is_not_taken_for_a_token_that_may_not_write(push, hub):
    hub.faults["upload"] = "403"
    error = refused(HubError, push, REPO)
    assert error.kind == "server"
    assert "answered 403 to a push" in str(error)


@pytest.mark.parametrize("subfolder", [None, "ant"])
def test_metadata_that_the_hub_refuses_are_refused_before_anything_is_created(push, hub, made, subfolder):
    (made.folder / "README.md").write_bytes(CARD.replace(b"apache-2.0", b"whatever"))
    error = refused(FormatError, push, subfolder=subfolder)
    assert "README.md: the Hub does not take its metadata" in str(error)
    assert '"license" must be one of' in str(error)
    assert hub.written == []


@pytest.mark.parametrize(
    "card", [b"---\nlicense: [\n---\n", b"---\n- a\n- b\n---\n", b"\xff\xfe", b"---\nmodel-index: 3\n---\n"]
)
def test_metadata_that_cannot_be_read_are_refused_without_a_request(push, hub, made, card):
    (made.folder / "README.md").write_bytes(card)
    assert "README.md" in str(refused(FormatError, push))
    assert hub.requests == []


def test_a_card_is_not_needed(push, hub, made):
    (made.folder / "README.md").unlink()
    assert "README.md" not in push().files


# Lost answers, conflicts, faults


def test_pushing_again_commits_nothing_and_reports_the_same_commit(push, hub, caplog):
    first = push()
    with caplog.at_level(logging.WARNING):
        again = push()
    assert (again.commit, again.changed, again.created) == (first.commit, False, False)
    assert kinds(hub).count("commit") == 1
    assert caplog.records == []


def test_only_what_changed_is_uploaded(push, hub, made):
    push()
    hub.written.clear()
    (made.folder / "README.md").write_bytes(CARD + b"Better.\n")
    push()
    assert hub.written == [("commit", ["README.md"])]


@pytest.mark.parametrize("arguments", [{}, {"branch": "slow"}, {"create_pr": True}, {"subfolder": "ant"}])
def test_a_commit_whose_answer_is_lost_is_found_and_reported(push, hub, arguments):
    hub.faults["commit"] = "lost"
    pushed = push(REPO, **arguments)
    reference = "refs/pr/1" if "create_pr" in arguments else arguments.get("branch", "main")
    assert hub.refs[reference] == pushed.commit
    assert pushed.changed
    assert (pushed.pull_request is not None) == ("create_pr" in arguments)
    assert kinds(hub).count("commit") == 1


def test_a_lost_commit_is_found_below_what_somebody_else_committed_since(push, hub):
    hub.faults["commit"] = "lost"
    hub.before["commits"] = lambda: hub.repositories[REPO].commit("main", {"theirs.txt": b"x"})
    pushed = push(REPO)
    assert pushed.commit != hub.refs["main"]
    assert hub.repositories[REPO].parents[hub.refs["main"]] == pushed.commit


def test_a_pull_request_whose_answer_was_lost_for_good_is_not_opened_twice(push, hub):
    hub.faults["commit"] = "lost"
    hub.before["commit"] = lambda: hub.faults.update(discussions="503")  # only the search after it fails
    assert "was made, and cannot be asked now" in str(refused(HubError, push, REPO, create_pr=True))
    hub.faults.clear()
    hub.before.clear()
    pushed = push(REPO, create_pr=True)
    assert pushed.pull_request is not None
    assert pushed.pull_request.endswith(f"/{REPO}/discussions/1")
    assert kinds(hub).count("commit") == 1


def test_a_commit_that_failed_is_an_error_and_the_next_push_makes_it(push, hub):
    hub.faults["commit"] = "503"
    error = refused(HubError, push, REPO)
    assert error.kind == "server"
    assert hub.refs["main"] == SHA
    hub.faults.clear()
    assert push(REPO).commit == hub.refs["main"] != SHA


def test_a_lost_answer_that_cannot_be_looked_up_says_so_and_the_next_push_finds_the_commit(push, hub):
    hub.faults |= {"commit": "lost", "commits": "400"}
    error = refused(HubError, push, REPO)
    assert "did not say whether the commit" in str(error)
    hub.faults.clear()
    pushed = push(REPO)
    assert (pushed.commit, pushed.changed) == (hub.refs["main"], False)
    assert kinds(hub).count("commit") == 1


def test_somebody_elses_commit_meanwhile_is_a_conflict(push, hub):
    hub.before["commit"] = lambda: hub.repositories[REPO].commit("main", {"theirs.txt": b"x"})
    error = refused(HubError, push, REPO)
    assert error.kind == "conflict"
    assert "somebody else committed" in str(error)
    assert "commit" not in kinds(hub)
    assert "policy.onnx" in hub.commits[hub.refs["main"]]


def test_a_branch_that_is_not_where_it_is_expected_is_a_conflict_before_any_upload(push, hub):
    assert refused(HubError, push, REPO, parent_commit="c3" * 20).kind == "conflict"
    assert refused(HubError, push, parent_commit=SHA).kind == "conflict"
    assert hub.written == []
    assert push(REPO, parent_commit=SHA).changed


def test_a_file_that_the_repository_ignores_is_not_lost_in_silence(push, hub):
    hub.repositories[REPO].ignored = ("policy.onnx",)
    hub.commits[SHA].pop("policy.onnx")
    error = refused(HubError, push, REPO)
    assert "lacks policy.onnx" in str(error)
    assert ".gitignore" in str(error)


@pytest.mark.parametrize("place", ["whoami", "info", "validate", "create", "commit", "paths-info"])
def test_a_token_that_the_server_repeats_is_shown_nowhere(push, hub, place):
    hub.faults[place] = "echo"
    refused(MeamError, push, NEW if place == "create" else REPO)


def test_a_dead_server_is_offline(push, hub):
    hub.stop()
    assert refused(HubError, push).kind == "offline"


def test_the_offline_environment_is_respected(push, hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    error = refused(HubError, push)
    assert error.kind == "offline"
    assert "HF_HUB_OFFLINE" in str(error)
    assert hub.requests == []


@pytest.mark.parametrize("place", ["whoami", "info", "validate", "commit", "paths-info"])
def test_a_silent_server_is_given_up(push, hub, monkeypatch, place):
    monkeypatch.setattr(patience, "SILENCE_S", 0.2)
    hub.faults[place] = "silent"
    start = time.monotonic()
    assert refused(HubError, push, REPO).kind == "timeout"
    assert time.monotonic() - start < 5


def test_a_server_that_drips_is_given_up(push, hub, monkeypatch):
    monkeypatch.setattr(publish, "DEADLINE_S", 0.5)
    hub.faults["whoami"] = "drip"
    start = time.monotonic()
    assert refused(HubError, push).kind == "timeout"
    assert time.monotonic() - start < 5


def test_an_upload_that_fails_leaves_no_commit(push, hub):
    hub.faults["upload"] = "400"
    assert refused(HubError, push, REPO).kind == "server"
    assert hub.refs["main"] == SHA


# save_pretrained


def test_a_saved_policy_is_the_same_folder_without_what_is_foreign(made, tmp_path):
    saved = made.load().save_pretrained(tmp_path / "new" / "place")
    assert {path.name for path in saved.iterdir()} == set(FILES)
    assert contents(saved) == contents(made.folder)
    assert (
        MeamPolicy.from_pretrained(saved, seed=0).act(OBSERVATION).tobytes()
        == made.load(seed=0).act(OBSERVATION).tobytes()
    )


def test_a_policy_of_the_hub_is_saved_with_all_its_variants(push, load, made, tmp_path):
    push(subfolder="ant")
    saved = load(NEW, subfolder="ant").save_pretrained(tmp_path / "saved")
    assert contents(saved) == contents(made.folder)
    assert not any(path.is_symlink() for path in saved.iterdir())


def test_saving_overwrites_nothing(made, tmp_path):
    (tmp_path / "mine.txt").touch()
    (made.folder / "model.safetensors").unlink()  # the folder to write is looked at first
    with pytest.raises(MeamError, match="already holds something"):
        made.load().save_pretrained(tmp_path)
    with pytest.raises(MeamError, match="already holds a policy"):
        made.load().save_pretrained(made.folder)
    with pytest.raises(ConfigError, match="folder is ''"):
        made.load().save_pretrained("")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# The command line


@pytest.fixture
def stored(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)


def test_the_command_pushes_and_says_what_it_did(hub, made, stored, capsys):
    assert run(["push", str(made.folder), NEW, "--private", "--branch", "slow", "--tag", "v1"]) == 0
    output = capsys.readouterr()
    repository = hub.repositories[NEW]
    commit = repository.refs["slow"]
    assert repository.private
    assert repository.tags == {"v1": commit}
    assert commit in output.out
    assert "model.safetensors" in output.out
    assert TOKEN not in output.out + output.err
    assert run(["push", str(made.folder), NEW, "--branch", "slow"]) == 0
    assert "nothing: the branch has these very files" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--tag", "a b"], "--tag is 'a b'; expected a name that git allows"),
        (["--branch", "a..b"], "--branch is 'a..b'; expected a name that git allows"),
        (["--message", "a\nb"], r"--message is 'a\nb'; expected one line of text"),
        (["--parent-commit", "main"], "--parent-commit is 'main'; expected a commit's 40"),
        (["--subfolder", "../x"], "--subfolder is '../x'; expected"),
        (["--create-pr", "--tag", "v1"], '--tag is "v1", but --create-pr asks for a pull request'),
    ],
)
def test_the_command_names_its_options_before_it_reads_the_policy(hub, stored, capsys, options, named):
    assert run(["push", "no/such/folder", NEW, *options]) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"meam: {named}")
    assert output.err.count("\n") == 1
    assert hub.requests == []


def test_the_command_names_a_repo_that_is_none_and_a_token_that_cannot_be_sent(hub, stored, monkeypatch, capsys):
    assert run(["push", "no/such/folder", "arm"]) == 2
    assert capsys.readouterr().err.startswith("meam: REPO is 'arm'; expected \"owner/name\"")
    monkeypatch.setenv("HF_TOKEN", "hf_secr\xe9t")
    assert run(["push", "no/such/folder", NEW]) == 2
    assert "in the variable HF_TOKEN has a character that cannot be sent" in capsys.readouterr().err
    assert hub.requests == []


def test_the_command_runs_dry(hub, made, stored, capsys):
    assert run(["push", str(made.folder), NEW, "--dry-run"]) == 0
    assert hub.written == []
    assert "dry run" in capsys.readouterr().out


def test_the_command_proposes_and_prints_json(hub, made, stored, capsys):
    assert run(["push", str(made.folder), REPO, "--create-pr", "--subfolder", "ant", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["pull_request"] == f"{hub.url}/{REPO}/discussions/1"
    assert found["commit"] == hub.refs["refs/pr/1"]
    assert set(found["files"]) == {f"ant/{name}" for name in FILES}


def test_the_command_fails_with_one_sentence(hub, made, stored, capsys):
    hub.role = "read"
    assert run(["push", str(made.folder), NEW]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("meam: The Hub token may only read")
    assert TOKEN not in output.err


def test_info_takes_a_subfolder(made, capsys):
    place = str(made.folder.parent)
    assert run(["info", place, "--subfolder", made.folder.name, "--json"]) == 0
    assert '"method": "by hand"' in capsys.readouterr().out
