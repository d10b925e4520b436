"""Push a policy or an adapter to the Hub, with its code, statistics and model card."""

import argparse

from .common import print_json


EXAMPLE = "push outputs/kitchen someone/openvla-7b-kitchen --private"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder of a saved policy or adapter")
    parser.add_argument("repo_id", help="Hub id such as someone/openvla-7b-kitchen, created if it does not exist")
    parser.add_argument(
        "--base-model", help="Hub id of the base model (default: the one that the adapter or the run names)"
    )
    parser.add_argument(
        "--dataset", nargs="+", help="Hub ids of the training data (default: those that the run names)"
    )
    parser.add_argument("--license", help="license (default: that of the base model)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="branch, created if it does not exist (default: main)")
    parser.add_argument("--create-pr", action="store_true", help="open a pull request instead of committing")
    parser.add_argument("--message", default="Upload OpenVLA policy", help="commit message (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from ..checkpoints.push import push as push_to_hub

    commit = push_to_hub(
        args.checkpoint,
        args.repo_id,
        base_model=args.base_model,
        datasets=args.dataset,
        license=args.license,
        private=args.private or None,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
    )
    if args.json:
        print_json({"commit": commit.oid, "url": commit.commit_url, "pull_request": commit.pr_url})
    else:
        print(f"Pushed: {commit.pr_url or commit.commit_url}")
