#!/usr/bin/env python3
"""Fetches the pinned third-party files Isthmus needs: libtorch, backbone weights, photos.

usage: python3 setup/fetch.py GROUP...      (groups: see assets.json, or --list)

Every file is named in setup/assets.json with its version and SHA-256. Downloads go through the
ordinary package clients (pip, apt-get), so mirrors and proxies configured for them are honoured.
Finished files stay in the cache (ISTHMUS_CACHE, default ~/.cache/isthmus): a second run goes on
from the first file that is missing. Python's standard library only.
"""
import argparse
import fnmatch
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LINKER_SCRIPT = "INPUT(-ltorch_cpu)\n"


class SetupError(Exception):
    """Something the user can act on; printed without a traceback."""


def cache_dir():
    given = os.environ.get("ISTHMUS_CACHE")
    if given:
        return Path(given).absolute()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "isthmus"


def say(text):
    print(f"fetch: {text}", file=sys.stderr, flush=True)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def need_tool(tool, why, remedy):
    if shutil.which(tool) is None:
        raise SetupError(f"'{tool}' was not found; it is needed to {why}. {remedy}")


def need_space(folder, size):
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:
        raise SetupError(
            f"{folder} has {free >> 20} MiB free, {size >> 20} MiB are needed. Free some space, or set "
            "ISTHMUS_CACHE to a folder on a larger disk, and run the same command again."
        )


def run_client(command, cwd, what):
    """Runs a package client; its progress goes straight to the terminal."""
    env = {**os.environ, "PIP_RESUME_RETRIES": os.environ.get("PIP_RESUME_RETRIES", "10")}  # where pip knows it
    done = subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=env, check=False)
    if done.returncode != 0:
        raise SetupError(
            f"{what} could not be downloaded (exit status {done.returncode} of: {' '.join(map(str, command))}). "
            "The client's own message is above. Check the network or its proxy settings and run the same "
            "command again; finished files are kept."
        )


def download_wheel(asset, folder):
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode:
        raise SetupError(
            f"this Python ({sys.executable}) has no pip. Install it (Debian: apt-get install python3-pip) and run again."
        )
    tags = asset["file"][:-4].split("-")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check",
               "--only-binary=:all:", "--dest", str(folder)]
    if tags[-1] != "any":
        for plat in tags[-1].split("."):
            command += ["--platform", plat]
        if tags[-3].startswith("cp"):
            command += ["--implementation", "cp", "--python-version", tags[-3][2:], "--abi", tags[-2]]
    run_client(command + [f"{asset['name']}=={asset['version']}"], folder, asset["file"])


def download_sdist(asset, folder):
    # pip asks a source package for its metadata, which runs its code: never before its hash has been checked
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write(f"{asset['name']}=={asset['version']} --hash=sha256:{asset['sha256']}\n")
        wanted.flush()
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check",
                   f"--no-binary={asset['name']}", "--require-hashes", "--dest", str(folder), "-r", wanted.name]
        run_client(command, folder, asset["file"])


def apt_lists_missing(asset):
    shown = subprocess.run(["apt-cache", "show", f"{asset['name']}={asset['version']}"], capture_output=True, check=False)
    return shown.returncode != 0


def download_deb(asset, folder):
    need_tool("apt-get", f"download the Debian package {asset['name']}",
              f"On another system, place {asset['file']} (SHA-256 {asset['sha256']}) in {folder.parent} yourself.")
    options = []
    if apt_lists_missing(asset):
        # private package lists: needs no root and leaves the system's own lists alone
        state = folder.parent / "apt-state"
        (state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        options = ["-o", f"Dir::State::Lists={state}/lists", "-o", f"Dir::Cache={state}"]
        (state / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        say("refreshing Debian's package lists")
        run_client(["apt-get", *options, "-o", "APT::Sandbox::User=", "update", "-q"], folder, "the package lists")
    run_client(["apt-get", *options, "-o", "APT::Sandbox::User=", "download", "-q",
                f"{asset['name']}={asset['version']}"], folder, asset["file"])


def download_npm(asset, folder):
    need_tool("npm", f"download the package {asset['name']}",
              f"Install it (Debian: apt-get install npm), or place {asset['file']} (SHA-256 {asset['sha256']}) in "
              f"{folder.parent} yourself.")
    name = asset.get("package", asset["name"])
    run_client(["npm", "pack", "--silent", f"{name}@{asset['version']}"], folder, asset["file"])


def download(asset, cache):
    """Returns the verified file, downloading it when it is not in the cache."""
    folder = cache / "downloads"
    target = folder / asset["file"]
    if target.exists():
        if sha256(target) == asset["sha256"]:
            return target
        say(f"{target} does not have the pinned SHA-256 (an interrupted or altered file); fetching it again")
        target.unlink()
    need_space(folder, 2 * asset["size"])
    say(f"{asset['file']} ({asset['size'] / 1e6:.0f} MB)")
    part = Path(tempfile.mkdtemp(prefix="part-", dir=folder))
    try:
        {"wheel": download_wheel, "sdist": download_sdist, "deb": download_deb, "npm": download_npm}[asset["kind"]](asset, part)
        got = [p for p in part.iterdir() if p.is_file()]
        if len(got) != 1:
            raise SetupError(f"expected one file for {asset['file']}, got {sorted(p.name for p in got)}")
        found = sha256(got[0])
        if found != asset["sha256"]:
            raise SetupError(
                f"{got[0].name}: SHA-256 is {found}, setup/assets.json pins {asset['sha256']}. The download is broken "
                "or the package was altered; it was thrown away. Run the same command again; if it stays, report it."
            )
        got[0].replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def unpack(archive, asset, dest):
    """Unpacks the members that match asset['extract'] into dest, once (dest/.complete marks success)."""
    stamp = dest / ".complete"
    if stamp.exists() and stamp.read_text() == asset["sha256"]:
        return
    shutil.rmtree(dest, ignore_errors=True)
    need_space(dest, asset.get("unpacked", 4 * asset["size"]))
    say(f"unpacking {asset['file']}")
    if asset["kind"] == "wheel":
        with zipfile.ZipFile(archive) as z:
            for member in z.infolist():
                if any(fnmatch.fnmatch(member.filename, pattern) for pattern in asset["extract"]):
                    # zipfile forgets the mode: programs would not run
                    Path(z.extract(member, dest)).chmod(0o644 | member.external_attr >> 16 & 0o111)
    elif asset["kind"] in ("npm", "sdist"):
        with tarfile.open(archive) as t:
            wanted = [m for m in t if m.isfile() and any(fnmatch.fnmatch(m.name, pattern) for pattern in asset["extract"])]
            t.extractall(dest, members=wanted, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    else:
        need_tool("dpkg-deb", "unpack Debian packages", "Install the package dpkg.")
        done = subprocess.run(["dpkg-deb", "-x", str(archive), str(dest)], check=False)
        if done.returncode != 0:
            raise SetupError(f"dpkg-deb could not unpack {archive}; delete that file and run again.")
    stamp.write_text(asset["sha256"])


def assemble_libtorch(parts, cache, version):
    """Lays out a LIBTORCH folder (include/, lib/, build-version) from unpacked wheels."""
    dest = cache / f"libtorch-{version}-{platform.machine()}"
    if (dest / "build-version").exists():
        return dest
    shutil.rmtree(dest, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="libtorch-", dir=cache))
    (work / "lib").mkdir()
    for part in parts:
        # from here on the part is no complete unpacking any more, whatever interrupts this
        (part / ".complete").unlink(missing_ok=True)
        include = part / "torch" / "include"
        if include.is_dir():
            shutil.move(str(include), work / "include")
        for lib in part.rglob("*.so*"):
            shutil.move(str(lib), work / "lib" / lib.name)
        shutil.rmtree(part)
    if not (work / "include").is_dir() or not (work / "lib" / "libtorch_cpu.so").is_file():
        shutil.rmtree(work)
        raise SetupError("libtorch could not be assembled (an earlier run was interrupted); run the same command again.")
    (work / "lib" / "libtorch.so").write_text(LINKER_SCRIPT)
    (work / "build-version").write_text(version + "\n")
    work.chmod(0o755)
    work.rename(dest)
    return dest


def link(path, target):
    """Points path (in the checkout, ignored by git) at target in the cache."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or path.exists():
        if path.is_symlink() and path.resolve() == target.resolve():
            return
        if not path.is_symlink():
            raise SetupError(f"{path} is in the way (not made by this script); move it elsewhere and run again.")
        path.unlink()
    path.symlink_to(target)


def fetch_group(group, assets, cache):
    machine = platform.machine()
    wanted = [a for a in assets if group in a["groups"] and a.get("machine", machine) == machine]
    if not wanted:
        raise SetupError(f"group '{group}' has nothing for {machine}; known groups: "
                         + ", ".join(sorted({g for a in assets for g in a["groups"]})))
    if group == "libtorch":
        version = next(a["version"] for a in wanted if a["name"] == "torch")
        dest = cache / f"libtorch-{version}-{machine}"
        if not (dest / "build-version").exists():
            parts = []
            for asset in wanted:
                part = cache / "unpacked" / asset["name"]
                unpack(download(asset, cache), asset, part)
                parts.append(part)
            dest = assemble_libtorch(parts, cache, version)
        link(ROOT / "third_party" / "libtorch", dest)
        return
    for asset in wanted:
        dest = cache / "unpacked" / f"{asset['name']}-{asset['sha256'][:12]}"
        stamp = dest / ".complete"
        if not (stamp.exists() and stamp.read_text() == asset["sha256"]):
            unpack(download(asset, cache), asset, dest)
        link(ROOT / "third_party" / asset["name"], dest)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP")
    parser.add_argument("--list", action="store_true", help="list the groups and their files")
    args = parser.parse_args()
    assets = json.loads((HERE / "assets.json").read_text())["assets"]
    if args.list or not args.groups:
        for a in assets:
            print(f"{','.join(a['groups']):24} {a['size'] / 1e6:7.1f} MB  {a['file']}")
        return
    cache = cache_dir()
    cache.mkdir(parents=True, exist_ok=True)
    for group in args.groups:
        fetch_group(group, assets, cache)
    say(f"ready: {', '.join(args.groups)} (cache: {cache})")


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"fetch: error: {error}")
    except OSError as error:
        sys.exit(f"fetch: error: {error}. If the disk is full, free some space or set ISTHMUS_CACHE to a folder on a "
                 "larger disk, and run the same command again.")
    except KeyboardInterrupt:
        sys.exit("fetch: interrupted; finished files are kept, run the same command to go on")
