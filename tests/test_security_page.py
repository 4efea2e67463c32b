"""Each line of the table in docs/security.md is tried: what a stranger's file must not do is not done."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorasmith.cli.main import main
from lorasmith.core.errors import LorasmithError, OptionError
from lorasmith.core.folders import Folders
from lorasmith.data.encoding_cache import EncodingCache, key_of
from lorasmith.families.model import Model
from lorasmith.families.parts.embeddings import EmbeddingFiles
from lorasmith.formats.lora_file import load_lora
from lorasmith.nodes import load_nodes
from lorasmith.runs.queue import JobStore, StoreError
from lorasmith.runs.recorded_run import read_run_file
from lorasmith.runs.run import run as train
from lorasmith.runs.run_log import read_run
from lorasmith.runs.run_page import report_of, write_report
from lorasmith.server.jobs import sweep_answers
from lorasmith.training.config import settings_from_file
from lorasmith.training.events import Outcome, RunFinished
from tests.hosts import Audience
from tests.runs.folder_cases import pictures, planned, with_metadata, with_record
from tests.training.run_cases import HOSTILE, picture, previewed, started, write_run

PAGE = (Path(__file__).parents[1] / "docs" / "security.md").read_text(encoding="utf-8")
TABLES = [
    re.findall(r"^\| ([^|]+) \|", part, flags=re.MULTILINE) for part in PAGE.split("What a file cannot do, you can")
]


CODE = ("optimizer", "schedule", "loss_function", "timesteps")  # settings that may name code


class Ran:
    """Unpickled, it is a mark that code was run."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return sys.exit, ("code of a file was run",)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stopped run in `work/`, its images beside it; not to be changed."""
    work = tmp_path_factory.mktemp("stranger") / "work"
    work.mkdir()
    train(planned(pictures(work / "photos", 4), work / "run", steps=3), Audience(stop_at=1))
    return work / "run"


@pytest.fixture
def here(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder and its images in the current folder, with nothing reachable but files."""

    def unreachable(*_: object, **__: object) -> None:
        pytest.fail("a file reached out")

    shutil.copytree(run.parent, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    monkeypatch.setattr("lorasmith.training.storage.trackers.tracker_for", unreachable)
    with_record(tmp_path / "work" / "run", source={"folder": str(tmp_path / "work" / "photos")})
    with_metadata(
        tmp_path / "work" / "run" / "cat.safetensors",
        lambda record: record["source"].update(folder=str(tmp_path / "work" / "photos")),
    )
    return tmp_path / "work"


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What a command prints when it fails."""
    monkeypatch.setattr(sys, "argv", ["lorasmith", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    return " ".join(capsys.readouterr().err.split())


HOSTILE_RECORDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "optimizer": ("asked", {"optimizer": "antigravity.X"}, "importing it would run code"),
    "schedule": ("asked", {"schedule": "antigravity:X"}, "importing it would run code"),
    "loss": ("asked", {"loss_function": "antigravity:X"}, "importing it would run code"),
    "hub": (
        "source",
        {"model": "owner/name"},
        "add --as-recorded to allow these, or give yours with {}: model owner/name",
    ),
    "links": ("source", {"follow_links": True}, "behind links out of the folder of images; add --as-recorded"),
    "elsewhere": (
        "source",
        {"folder": "/etc"},
        "add --as-recorded to allow these, or give yours with {}: images /etc",
    ),
}


RECORD_READERS = {
    "reproduce": (("run/cat.safetensors", "--dry-run"), "--model and --data"),
    "resume": (("run",), "--model and --data"),
    "train": (("--config", "run/run.json"), "the folder of images, --model and the like"),
}
"""Commands that repeat a record: their arguments, and those that give other files."""


@pytest.mark.parametrize("case", HOSTILE_RECORDS)
@pytest.mark.parametrize("command", RECORD_READERS)
def test_a_record_names_no_code_no_download_and_nothing_elsewhere(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str, command: str
) -> None:
    part, changes, sentence = HOSTILE_RECORDS[case]
    with_record(here / "run", **{part: changes})
    with_metadata(here / "run" / "cat.safetensors", lambda record: record[part].update(changes))
    arguments, own = RECORD_READERS[command]
    assert sentence.format(own) in said(capsys, monkeypatch, command, *arguments)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("command", RECORD_READERS)
def test_a_record_starts_no_tracker(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    with_record(here / "run", asked={"track": "wandb"})
    with_metadata(here / "run" / "cat.safetensors", lambda record: record["asked"].update(track="wandb"))
    arguments, _ = RECORD_READERS[command]
    monkeypatch.setattr(sys, "argv", ["lorasmith", command, *arguments])
    try:
        main()
    except SystemExit as stop:
        assert not stop.code
    out = " ".join(capsys.readouterr().out.split())
    assert command == "reproduce" or "is not started; --track wandb starts it." in out


def lora(tmp_path: Path, tiny: Model) -> None:
    for name in ("a.safetensors", "a.pt"):
        (tmp_path / name).write_bytes(pickle.dumps(Ran()))
        with pytest.raises(LorasmithError, match=r"pickled|safetensors"):
            load_lora(tmp_path / name, tiny.names)


def settings(tmp_path: Path) -> None:
    for name in CODE:
        (tmp_path / "settings.toml").write_text(f'{name} = "antigravity:X"\n')
        with pytest.raises(OptionError, match="importing it would run code"):
            read_run_file(tmp_path / "settings.toml").trusted()


def report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    secret = picture(tmp_path / "secret.png", "secret", (200, 0, 0))
    shown = previewed(folder, 9, 1.0, ["a"])
    outside = type(shown)(step=9, prompts=("a",), paths=(str(secret),), strength=1.0)
    write_run(folder, [started(9), outside], captions=[HOSTILE])
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "command": ["rm", "-rf", "~"], "source": {"argv": ["rm"]}}))
    page = write_report(folder, RunFinished(step=9, reason=Outcome.FINISHED)).read_text(encoding="utf-8")
    assert "<script" not in page and "data:image" not in page and "rm -rf ~\n" not in page
    assert not any("rm" in command.split() for command in report_of(read_run(folder)).commands.values())
    (folder / "run.json").write_text(json.dumps({**record, "title": "../secret"}))
    with pytest.raises(LorasmithError, match="name must be a file name without folders"):
        write_report(folder)


def embedding(tmp_path: Path) -> None:
    (tmp_path / "embeddings").mkdir()
    files = EmbeddingFiles(Folders.of("embeddings", tmp_path / "embeddings"))
    (tmp_path / "secret.safetensors").write_bytes(b"")
    for name in ("../secret", str(tmp_path / "secret"), "x/../../secret", "..\\secret", "\0"):
        assert files.find(name) is None


def workflow(tmp_path: Path) -> None:
    inputs = {one.name: one for one in load_nodes()["TrainLoraNode"].inputs}
    for name in CODE:
        with pytest.raises(OptionError, match=f"{name} must be one of"):
            inputs[name].check("antigravity:X", Folders(tmp_path))
        with pytest.raises(OptionError, match="importing it would run code"):
            settings_from_file({name: "antigravity:X"})


def encodings(tmp_path: Path) -> None:
    encoder, key = key_of(encoder=1), key_of(number=1)
    with EncodingCache(tmp_path / "cache", limit_bytes=2**30).entries(encoder) as entries:
        entries.put(key, {"latents": torch.ones(100)})
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    content = path.read_bytes()
    secret = tmp_path / "secret"
    secret.write_bytes(content)
    for forged in (
        content[:-7] + b"\x01" + content[-6:],
        pickle.dumps(Ran()),
        content.replace(key.encode() + b"/latents", b"../" * 23 + b"/secret"),
    ):
        path.write_bytes(forged)
        with (cache := EncodingCache(tmp_path / "cache", limit_bytes=2**30)).entries(encoder) as entries:
            assert entries.get(key) is None
        assert "The encoding cache is damaged" in cache.notes[0]
    cache.clear()
    assert secret.exists()


def sweep_queue(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "s"
    queue = JobStore(folder / "queue.sqlite3")
    for name in ("../../elsewhere", "a/b", "fine"):
        queue.add("train", {}, id=name, sweep="s")
    queue.close()
    before = (folder / "queue.sqlite3").read_bytes()
    assert [one.name for one in sweep_answers.sweep(Folders(tmp_path), "s").runs] == ["fine"]
    assert (folder / "queue.sqlite3").read_bytes() == before
    database = sqlite3.connect(folder / "queue.sqlite3")
    database.executescript(
        "DROP TABLE jobs; CREATE VIEW jobs AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT i FROM n"
    )
    database.close()
    with pytest.raises(StoreError):
        sweep_answers.sweep(Folders(tmp_path), "s")


LINES: dict[str, tuple[Callable[..., None] | None, str]] = {
    "LoRA": (lora, "formats/test_container.py test_refuses_pickled_files_and_says_how_to_convert"),
    "record in a LoRA (`reproduce`)": (None, "test_security_page.py test_a_record_starts_no_tracker"),
    "record of a run as settings (`train --config run.json`)": (
        None,
        "test_security_page.py test_a_record_names_no_code_no_download_and_nothing_elsewhere, "
        "runs/test_run_file.py test_a_record_names_files_here_unless_others_are_typed",
    ),
    "settings in TOML (`train --config`, `sweep`)": (
        settings,
        "runs/test_run_file.py test_code_and_trackers_are_typed, "
        "runs/test_sweep_launch.py test_names_with_control_characters_and_quotes_leave_for_no_other_program",
    ),
    "run folder (`resume`)": (
        None,
        "training/storage/test_run_states.py test_every_flipped_bit_is_noticed "
        "test_a_state_without_its_digest_is_not_used",
    ),
    "run folder (`report`)": (report, "runs/test_run_page.py test_hostile_captions_stay_text"),
    "checkpoint or GGUF": (
        None,
        "families/test_loading.py test_a_pickled_file_is_refused_whatever_it_is_called, "
        "families/files/test_gguf.py test_headers_without_bounds_are_refused test_damage_is_told_in_a_sentence",
    ),
    "embedding (`embedding:name` in prompts)": (
        embedding,
        "families/parts/test_embeddings.py test_no_file_runs_code_or_breaks_a_prompt, "
        "core/test_tensor_pickles.py test_the_pickle_that_was_checked_is_the_one_that_is_read",
    ),
    "diffusers folder": (
        None,
        "core/test_pretrained.py test_what_a_configuration_names_is_refused_before_anything_is_loaded",
    ),
    "workflow": (
        workflow,
        "core/test_folders.py test_names_that_lead_out_are_refused_everywhere "
        "test_no_prefix_leads_out_of_the_output_folder "
        "test_inputs_behind_links_out_of_the_base_are_read_only_if_that_is_typed, "
        "workflow/test_editor_format.py test_what_is_refused",
    ),
    "saved data set (`LoadTrainingDataset`)": (
        None,
        "data/test_comfyui_shards.py test_anything_else_is_refused_in_a_sentence, "
        "data/test_saved_samples.py test_a_damaged_folder_is_a_sentence",
    ),
    "videos": (
        None,
        "data/test_video_files.py test_a_file_that_names_others_is_not_followed "
        "test_a_number_of_frames_that_the_file_cannot_hold_is_refused",
    ),
    "images, captions, masks, controls and metadata files": (
        None,
        "data/test_folder.py test_what_a_link_leads_out_to_is_read_only_if_that_is_typed, "
        "runs/test_run_page.py test_hostile_captions_stay_text",
    ),
    "metadata file of images": (
        None,
        "data/test_metadata_files.py test_names_never_leave_the_folder, "
        "data/test_source_files.py test_entries_without_an_image_are_said, "
        "data/test_folder.py test_what_a_link_leads_out_to_is_read_only_if_that_is_typed",
    ),
    "folder saved by `datasets`": (
        None,
        "data/test_hub_datasets.py test_a_saved_dataset_lists_no_files_elsewhere "
        "test_a_saved_dataset_has_no_files_behind_links",
    ),
    "`extra_model_paths.yaml`": (None, "core/test_folders.py test_malformed_extra_model_paths"),
    "captioning model (`data caption`)": (
        None,
        "data/test_transformers_captions.py test_what_is_no_such_model_is_a_sentence",
    ),
    "CLIP (`evaluate --clip`)": (
        None,
        "core/test_pretrained.py test_what_a_configuration_names_is_refused_before_anything_is_loaded",
    ),
    "encoding cache": (encodings, "data/test_encoding_cache.py test_each_flipped_byte_is_noticed_or_harmless"),
    "queue of a sweep (`runs/*/queue.sqlite3`)": (sweep_queue, ""),
    "any text in a command to copy": (
        None,
        "runs/test_command_lines.py test_what_is_copied_is_one_command test_nothing_in_a_command_acts_on_a_terminal",
    ),
}
"""The attack behind each line, and the tests of its room that hold it: a file in tests/ and functions of it."""


@pytest.mark.parametrize("line", [name for name, (attack, _) in LINES.items() if attack])
def test_a_file_does_what_its_line_says_and_no_more(line: str, request: pytest.FixtureRequest) -> None:
    attack, _ = LINES[line]
    assert attack is not None
    names = attack.__code__.co_varnames[: attack.__code__.co_argcount]
    attack(**{name: request.getfixturevalue(name) for name in names})


REQUESTS = {
    "from a page of another site": (
        "server/test_access.py test_every_route_refuses_a_foreign_host test_every_write_refuses_a_foreign_origin "
        "test_no_page_of_another_site_is_let_in_by_cors, "
        "server/pages/test_foreign_page.py test_a_page_of_another_site_can_do_nothing"
    ),
    "from another machine": (
        "server/test_access.py test_every_route_needs_the_token test_a_server_that_others_reach_needs_a_token "
        "test_secrets_are_in_no_answer_and_no_log test_wrong_tokens_are_refused_late_and_end_their_connection"
    ),
    "training, plan, check or measurement": (
        "server/jobs/test_plan_answers.py test_names_that_requests_may_not_have_are_refused, "
        "server/jobs/test_job_routes.py test_a_folder_elsewhere_is_for_who_sits_here "
        "test_a_folder_of_the_home_is_for_who_sits_here, "
        "server/test_dataset_routes.py test_what_cannot_be_done_is_said"
    ),
    "graph": "test_security_page.py workflow",
    "download of a model (`POST /downloads`)": (
        "server/models/test_model_routes.py test_nothing_is_asked_of_the_hub_before_it_is_wanted, "
        "runs/test_hub_download.py test_damaged_bytes_are_deleted_and_get_no_name "
        "test_nothing_is_downloaded_that_does_not_fit_the_disk test_files_are_downloaded_verified_and_named"
    ),
    "token of the hub (`PUT /hub-token`)": (
        "server/models/test_model_routes.py test_a_token_is_stored_by_pages_of_this_machine_alone, "
        "server/pages/test_shelf_on_a_server.py test_a_model_comes_from_the_hub"
    ),
    "model file that is sent": (
        "server/models/test_model_routes.py test_a_model_file_that_is_sent_goes_where_it_belongs"
    ),
    "upload of photos and captions": (
        "server/test_dataset_answers.py test_an_upload_is_kept_under_a_safe_free_name "
        "test_what_is_no_picture_is_not_kept test_an_uploaded_text_is_a_caption"
    ),
    "drawing with the LoRA of a run": (
        "server/runs/test_run_result_answers.py test_a_record_chooses_among_the_models_of_the_server "
        "test_what_is_no_picture_and_a_folder_elsewhere_are_refused test_values_out_of_range_are_refused"
    ),
    "what is asked of a run that trains (its `requests/`, too)": (
        "runs/test_run_requests.py test_a_prompt_is_drawn_while_the_run_trains "
        "test_a_requested_preview_and_lora_change_no_number, "
        "server/runs/test_run_result_answers.py test_a_run_that_trains_is_asked_for_a_drawing"
    ),
    "gallery and card of a run": (
        "server/runs/test_run_result_answers.py test_a_gallery_has_prompts_by_kind_steps_and_strengths "
        "test_a_card_has_pictures_and_no_path"
    ),
    "name of a file": (
        "server/test_contained_files.py test_names_outside test_links_are_followed_to_where_they_lead, "
        "server/comfyui/test_file_routes.py test_no_name_leads_out_of_its_folder, "
        "server/test_access.py test_no_name_makes_a_route_fail, "
        "server/comfyui/test_user_files.py test_names_of_devices_are_refused, "
        "server/test_dataset_answers.py test_links_that_leave_are_not_followed, "
        "server/runs/test_run_answers.py test_links_out_of_a_run_are_not_followed"
    ),
    "removal, and upload that overwrites": (
        "server/comfyui/test_user_files.py test_workflows_are_written_read_listed_moved_and_set_aside, "
        "server/comfyui/test_file_routes.py test_what_an_upload_replaces_is_set_aside, "
        "server/test_dataset_routes.py test_a_dataset_from_its_name_to_its_end "
        "test_a_dataset_that_a_job_needs_is_not_removed, "
        "server/runs/test_run_routes.py test_a_run_is_named_starred_noted_removed_and_brought_back"
    ),
    "return of a run": "server/runs/test_run_routes.py test_a_run_is_named_starred_noted_removed_and_brought_back",
    "caption": "server/test_dataset_routes.py test_a_caption_is_replaced_if_it_is_the_one_that_was_seen",
    "settings of the editor": (
        "server/comfyui/test_user_files.py test_settings_that_cannot_be_read_are_set_aside_before_others_are_written"
    ),
    "uploaded HTML, SVG or script": (
        "server/comfyui/test_file_routes.py test_what_a_browser_would_run_is_a_download, "
        "server/comfyui/test_user_files.py test_a_page_is_never_served_as_one"
    ),
    "report of a run": "server/runs/test_run_answers.py test_the_page_is_made_from_the_records",
    "large body, large picture, many jobs, silent or slow client, many connections": (
        "server/test_access.py test_bodies_are_limited test_bodies_that_are_read_have_a_limit_together "
        "test_a_body_that_stops_arriving_is_cut_off test_a_client_that_does_not_read_an_answer_is_cut_off, "
        "server/test_dataset_routes.py test_uploads_have_limits test_captions_leave_the_last_of_the_disk, "
        "server/comfyui/test_file_routes.py test_uploads_that_arrive_together_leave_the_last_of_the_disk, "
        "server/comfyui/test_user_files.py test_files_and_settings_leave_the_last_of_the_disk, "
        "server/comfyui/test_graph_answers.py test_a_picture_of_huge_sides_is_refused_by_its_header "
        "test_large_pictures_are_converted_one_at_a_time, "
        "server/comfyui/test_prompt_routes.py test_a_prompt_is_queued_as_its_client_sent_it, "
        "server/comfyui/test_queue_routes.py test_history_is_sent_while_it_is_read, "
        "runs/test_queue.py test_requests_have_a_limit_together, "
        "server/test_dispatcher.py test_a_job_leaves_the_last_of_the_disk, "
        "server/test_connections.py test_silent_connections_make_room_the_oldest_first "
        "test_headers_have_a_time_and_a_size, "
        "server/comfyui/test_websocket.py test_a_client_that_never_reads_is_cut_off"
    ),
    "malformed request, or one that meets a bug": (
        "server/test_http_server.py test_tables_are_mounted_and_errors_become_answers, "
        "server/test_log_book.py test_records_of_packages_are_lines_and_not_printed "
        "test_lines_are_remembered_written_and_published, server/test_access.py test_no_name_makes_a_route_fail"
    ),
    "module in the base folder": (
        "server/test_server_processes.py test_the_assistant_answers_and_a_stranger_module_is_not_imported"
    ),
}
"""The tests behind each line of the server's table: a file in tests/ and functions of it."""


def test_every_line_is_tried() -> None:
    assert TABLES[0] == ["file", *LINES]
    table = PAGE.partition("## Requests to the server")[2].partition("## Not covered")[0]
    assert re.findall(r"^\| ([^|]+) \|", table, flags=re.MULTILINE) == ["request", *REQUESTS]
    named = {line: tests for line, (_, tests) in LINES.items() if tests}
    for line, tests in (*named.items(), *REQUESTS.items()):
        for place in tests.split(", "):
            file, *names = place.split()
            code = (Path(__file__).parent / file).read_text(encoding="utf-8")
            assert names and [name for name in names if f"def {name}(" not in code] == [], line


def test_every_flag_is_one(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = re.findall(r"^\| (`--[^|]+) \| (`[^|]+) \|", PAGE, flags=re.MULTILINE)
    of: dict[str, set[str]] = {}
    for flags, commands in rows:
        for command in re.findall(r"`([\w ]+)`", commands):
            of.setdefault(command, set()).update(re.findall(r"--[\w-]+", flags))
    assert of.keys() == {"resume", "reproduce", "train", "sweep", "data check", "data caption", "run", "serve"}
    for command, wanted in of.items():
        monkeypatch.setattr(
            sys,
            "argv",
            ["lorasmith", *command.split(), "--help-all" if command in ("train", "data check") else "--help"],
        )
        with pytest.raises(SystemExit):
            main()
        shown = capsys.readouterr().out
        assert [flag for flag in wanted if flag not in shown] == []
