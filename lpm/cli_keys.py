"""Commands for keys and manifests: a thin shell over `lpm.protocol.registrar` and `lpm.oversight`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["manifest", "register_keys"]

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The key folder.", show_default=False)]
Authority = Annotated[Path, typer.Option(metavar="DIR", help="The registrar's own folder.", show_default=False)]
manifest = typer.Typer(help="Read, compare and approve what a session's parties sign.", no_args_is_help=True)


def register_keys(keys: typer.Typer) -> None:
    """Add the commands to `lpm keys`.

    Args:
        keys: the group.
    """
    keys.command("new")(new)
    keys.command("request")(request)
    keys.command("install")(install)
    keys.command("rotate")(rotate)
    keys.command("authority")(authority_new)
    keys.command("certify")(certify)
    keys.command("revoke")(revoke)


def new(
    folder: Folder, name: Annotated[str, typer.Option(help="As it is to be certified.", show_default=False)]
) -> None:
    """Make this party's own keys; they never leave the folder."""
    from lpm import console
    from lpm.protocol.registrar import new_keys

    fingerprint = new_keys(folder, name)
    console.note(f"Send {folder / 'request.json'} to the registrar, and read this out to them: {fingerprint}")


def request(
    folder: Folder, name: Annotated[str, typer.Option(help="As it is to be certified.", show_default=False)]
) -> None:
    """Write the request for certificates anew, say when they are about to expire."""
    from lpm import console
    from lpm.protocol.registrar import request_of

    fingerprint = request_of(folder, name)
    console.note(f"Send {folder / 'request.json'} to the registrar, and read this out to them: {fingerprint}")


def install(
    certificates: Annotated[Path, typer.Argument(metavar="SENT", help="What the registrar sent.", show_default=False)],
    folder: Folder,
) -> None:
    """Put the registrar's certificates beside one's keys; after a rotation, the new keys come into force."""
    from lpm import console
    from lpm.protocol.registrar import install as put

    console.note(f"{folder} holds the certified keys of {put(certificates, folder)}.")


def rotate(folder: Folder) -> None:
    """Make the keys that are to follow these, vouched for by these, which stay in force until `install`."""
    from lpm import console
    from lpm.protocol.registrar import rotate as follow

    fingerprint = follow(folder)
    sent = folder / "next" / "request.json"
    console.note(f"Send {sent} to the registrar, and read this out to them: {fingerprint}")


def authority_new(folder: Folder) -> None:
    """Make the registrar's own key, on a machine that is kept offline."""
    from lpm import console
    from lpm.protocol.identity import make_authority

    make_authority(folder)
    console.note(f"The authority is in {folder}. Keep authority.key offline; authority.pem goes to everybody.")


def certify(
    request: Annotated[Path, typer.Argument(metavar="REQUEST", help="A party's request.json.", show_default=False)],
    authority: Authority,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to put the certificates.", show_default=False)],
    fingerprint: Annotated[str, typer.Option(metavar="HEX", help="As the party read it out.")] = "",
    days: Annotated[float, typer.Option(help="How long they are valid.")] = 365.0,
    host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Of the coordinator's machine, as often as needed.")
    ] = None,
) -> None:
    """Certify a party's keys, as the registrar."""
    from lpm import console
    from lpm.protocol.registrar import certify as sign

    name, found = sign(request, authority, out, fingerprint=fingerprint, days=days, hosts=tuple(host or ()))
    if not fingerprint:
        console.note(f"Nobody has compared the fingerprint yet: have {name} read out {found} before you send it.")
    console.note(f"Send {out} back to {name}; they run `lpm keys install`.")


def revoke(
    certificates: Annotated[
        list[Path], typer.Argument(metavar="CERT…", help="PEM files, or folders with both.", show_default=False)
    ],
    authority: Authority,
) -> None:
    """Take certificates back, as the registrar."""
    from lpm import console
    from lpm.protocol.registrar import revoke as take_back

    count = take_back(certificates, authority)
    console.note(f"{authority / 'revoked.pem'} lists {count} certificates; everybody copies it into their key folder.")


@manifest.command("show")
def manifest_show(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A manifest.json.", show_default=False)],
) -> None:
    """Show a manifest in words."""
    from lpm.oversight import manifest_rows, read_manifest

    for key, value in manifest_rows(read_manifest(file)).items():
        typer.echo(f"{key:18} {value}")


@manifest.command("diff")
def manifest_diff(
    before: Annotated[Path, typer.Argument(metavar="BEFORE", help="A manifest.json.", show_default=False)],
    after: Annotated[Path, typer.Argument(metavar="AFTER", help="Another.", show_default=False)],
) -> None:
    """Show what differs between two manifests; exit code 1 if what is to be approved does."""
    from lpm.oversight import manifest_diff as difference
    from lpm.oversight import read_manifest

    rows = difference(read_manifest(before), read_manifest(after))
    for key, old, new in rows:
        typer.echo(f"{key}\n  - {old or 'nothing'}\n  + {new or 'nothing'}")
    if rows:
        raise typer.Exit(1)
    typer.echo("The same parties, keys and terms.")


@manifest.command("sign")
def manifest_sign(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The manifest that was shown.", show_default=False)],
    keys: Annotated[Path, typer.Option(metavar="DIR", help="This party's own key folder.", show_default=False)],
    policy: Annotated[Path, typer.Option(metavar="FILE", help="The policy.toml that asks.", show_default=False)],
) -> None:
    """Approve these parties, keys and terms by hand, for this and every later session that has the same."""
    from lpm import console
    from lpm.oversight import approve, read_manifest

    console.note(f"Approved: {approve(read_manifest(file), keys, policy)}")
