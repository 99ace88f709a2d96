"""What was chosen is sent to the Hub, and what a person does with it there is said."""

import contextlib

from pipeline import hub, locks
from pipeline.publication import Publication, card
from pipeline.published_card import quoted, snippet, stated_license
from pipeline.push_list import RESULT, PushList, Revision
from pipeline.run_identity import run_identity

# What a prompt is where a model's folder knows none.
PROMPT = "The "


def sent(made: Publication) -> tuple[Publication, str]:
    """Send it; return it as it is there, and the commit.

    Raises:
        hub.Permanent: the Hub refuses it.
        hub.Temporary: it failed, and the same again may not.
    """
    if made.options.prepared:
        return made, _pushed(made)
    if made.identity is None:
        made = made._replace(identity=run_identity(made.run))
    with (
        locks.locked(made.run, "--run")
        if made.waits_as or made.before
        else contextlib.nullcontext()
    ):
        access = hub.access(
            made.repo_id, identity=made.identity, private=made.is_private, revision=made.revision,
            overwrite=made.options.force,
        )  # fmt: skip
        push_list = PushList(made.run) if made.run is not None else None
        for one in [*made.before, made]:
            commit = _pushed(one)
            if one.waits_as is not None:
                push_list.mark_sent(one.waits_as, commit)
        is_theirs = push_list is not None and push_list.repo_id == made.repo_id
        if is_theirs and made.waits_as is None and made.options.checkpoint is None:
            result = Revision(RESULT, made.revision, made.updates, made.title, commit)
            push_list.add_sent(result)
    return made._replace(is_private=access.is_private), commit


def _pushed(made: Publication) -> str:
    return hub.push(
        made.files, made.repo_id, identity=made.identity, title=made.title,
        revision=made.revision, overwrite=made.options.force, attempts=made.options.attempts,
    )  # fmt: skip


def farewell(made: Publication) -> str:
    """Say where the model is, and how it is loaded from there."""
    page = hub.page(made.repo_id)
    code = snippet(quoted(made.repo_id, made.revision), (made.prompts or [PROMPT])[0])
    if not made.is_private:
        return f"{page}\n\n{code}"
    return (
        f"{page} (private: who loads it needs HF_TOKEN or a login; {page}/settings makes it "
        f"public)\n\n{code}"
    )


def wish(failure: hub.Temporary) -> str:
    """Say how long the server asks to wait, for who starts this as a process; often nothing."""
    return "" if failure.retry_after is None else f"retry_after: {failure.retry_after:g}\n"


def sent_space(made: Publication) -> str:
    """Make the Space on which the model can be tried, and return its address.

    Raises:
        hub.Permanent, hub.Temporary: as `sent`.
    """
    from pipeline.space import space_files

    repo_id, identity = f"{made.repo_id}-demo", made.identity
    files = space_files(
        made.repo_id,
        title=made.repo_id.partition("/")[2],
        prompts=made.prompts,
        is_adapter="adapter_config.json" in made.files,
        is_private=made.is_private,
        license=stated_license(card(made)) if card(made) else None,
    )
    place = {"identity": identity, "overwrite": made.options.force, "repo_type": "space"}
    hub.access(repo_id, private=made.is_private, **place)
    hub.push(files, repo_id, title=f"A page for {made.repo_id}", **place)
    page = hub.page(repo_id, "space")
    if not made.is_private:
        return f"the page to try it: {page}"
    return (
        f"the page to try it: {page} (the model is private: it works when {page}/settings has a "
        "secret HF_TOKEN that may read it)"
    )
