//! Man pages, completions, and what `scripts/install` puts where.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use braidfs_tests::command::Cmd;
use braidfs_tests::env::{Env, Outcome, project_root};
use braidfs_tests::runner::{self, Test};

const VERBS: [(&str, u8); 14] = [
    ("bench", 1),
    ("control", 8),
    ("doctor", 1),
    ("fsck", 8),
    ("info", 1),
    ("label", 8),
    ("mkfs", 8),
    ("mount", 8),
    ("probe", 1),
    ("scrub", 8),
    ("stats", 1),
    ("top", 1),
    ("trace", 1),
    ("umount", 8),
];

fn main() -> ExitCode {
    runner::main(
        "install",
        &[
            Test::new("each_option_of_help_is_in_the_manual", 60, manual),
            Test::new("man_pages_are_well_formed", 60, well_formed),
            Test::new("bash_completes", 60, bash),
            Test::new("zsh_loads_its_completions", 60, zsh),
            Test::new("fish_completes", 60, fish),
            Test::new("installs_and_removes_exactly_that", 120, install),
            Test::new("what_is_installed_works", 60, works),
            Test::new("a_debian_package", 120, debian),
            Test::new("install_refuses_wrong_usage", 60, wrong_usage),
        ],
    )
}

/// The generated files.
fn generated(env: &Env) -> PathBuf {
    let folder = env.path("generated");
    env.braidfs().arg("generate-manual").arg(&folder).ok();
    folder
}

fn read(path: &Path) -> String {
    let text = fs::read_to_string(path);
    text.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Options that a help text lists: first words of lines that begin with a dash.
fn options_of(help: &str) -> BTreeSet<String> {
    let lines = help.lines().map(str::trim_start);
    lines
        .filter(|line| line.starts_with('-'))
        .flat_map(|line| line.split([' ', ',']).take(3))
        .filter(|word| word.starts_with('-') && word.len() > 1)
        .map(|word| {
            word.split(['=', '[', '<'])
                .next()
                .unwrap_or(word)
                .to_owned()
        })
        .collect()
}

fn manual(env: &Env) -> Outcome {
    let folder = generated(env);
    let help = env.braidfs().arg("--help").ok().stdout;
    let known = help.lines().filter_map(|line| {
        let line = line
            .strip_prefix("  ")
            .filter(|line| !line.starts_with(' '))?;
        line.split(' ')
            .next()
            .filter(|word| !word.starts_with('-') && *word != "help")
    });
    let known: BTreeSet<&str> = known.collect();
    assert_eq!(known, VERBS.iter().map(|(verb, _)| *verb).collect());
    for (verb, section) in VERBS {
        let page = format!("man/man{section}/braidfs-{verb}.{section}");
        let page = read(&folder.join(page)).replace("\\-", "-");
        let help = env.braidfs().args([verb, "--help"]).ok().stdout;
        let options = options_of(&help);
        assert!(options.contains("--help"), "{options:?}");
        for option in options {
            assert!(page.contains(&option), "the page of {verb} lacks {option}");
        }
        assert!(page.contains(".SH \"EXIT STATUS\"") || page.contains(".SH EXIT STATUS"));
    }
    Ok(())
}

fn well_formed(env: &Env) -> Outcome {
    env.need_tools(&["groff"])?;
    let folder = generated(env);
    for section in ["1", "5", "8"] {
        let pages = fs::read_dir(folder.join(format!("man/man{section}"))).expect("pages");
        for page in pages.flatten().map(|entry| entry.path()) {
            let text = read(&page);
            if let Some(target) = text.strip_prefix(".so ") {
                assert!(folder.join("man").join(target.trim()).is_file(), "{text}");
                continue;
            }
            let groff = Cmd::new("groff").args(["-man", "-Tascii", "-ww", "-z"]);
            let output = groff.arg(&page).ok();
            assert_eq!(output.text().trim(), "", "{}", output.describe());
        }
    }
    Ok(())
}

fn bash(env: &Env) -> Outcome {
    env.need_tools(&["bash"])?;
    let script = generated(env).join("completions/bash/braidfs");
    let ask = |words: &[&str]| {
        let text = "set -u; source \"$1\"; shift; COMP_WORDS=(\"$@\"); COMP_CWORD=$(($# - 1)); \
                    COMPREPLY=(); _braidfs braidfs \"${COMP_WORDS[COMP_CWORD]}\" \
                    \"${COMP_WORDS[COMP_CWORD - 1]}\"; printf '%s\\n' \"${COMPREPLY[@]}\"";
        let bash = Cmd::new("bash").args(["--norc", "-c", text, "bash"]);
        bash.arg(&script).args(words).ok().stdout
    };
    let verbs = ask(&["braidfs", ""]);
    for (verb, _) in VERBS {
        assert!(verbs.lines().any(|line| line == verb), "no {verb}: {verbs}");
    }
    assert!(!verbs.contains("generate"), "{verbs}");
    assert_eq!(ask(&["braidfs", "mk"]).trim(), "mkfs");
    assert!(ask(&["braidfs", "mkfs", "--st"]).contains("--stripe-unit"));
    assert!(ask(&["braidfs", "probe", "--output", ""]).contains("export"));
    Ok(())
}

fn zsh(env: &Env) -> Outcome {
    env.need_tools(&["zsh"])?;
    let folder = generated(env).join("completions/zsh");
    let text = "fpath=($1 $fpath); autoload -Uz compinit; compinit -D -u; \
                print -r -- ${_comps[braidfs]}; autoload +X _braidfs; whence -w _braidfs";
    let zsh = Cmd::new("zsh").args(["-f", "-c", text, "zsh"]).arg(folder);
    let output = zsh.env("ZDOTDIR", &env.dir).ok();
    assert_eq!(output.stdout, "_braidfs\n_braidfs: function\n");
    assert_eq!(output.stderr, "", "{}", output.describe());
    Ok(())
}

fn fish(env: &Env) -> Outcome {
    env.need_tools(&["fish"])?;
    let script = generated(env).join("completions/fish/braidfs.fish");
    let ask = |line: &str| {
        let text = "source $argv[1]; complete --do-complete $argv[2]";
        let fish = Cmd::new("fish")
            .env("HOME", &env.dir)
            .args(["--no-config", "-c", text]);
        fish.arg(&script).arg(line).ok().stdout
    };
    let verbs = ask("braidfs ");
    for (verb, _) in VERBS {
        assert!(
            verbs.lines().any(|line| line.starts_with(verb)),
            "no {verb}: {verbs}"
        );
    }
    assert!(ask("braidfs mkfs --st").contains("--stripe-unit"));
    Ok(())
}

fn script(env: &Env) -> Cmd {
    let script = Cmd::new(project_root().join("scripts/install"));
    script.arg("--binary").arg(&env.bin)
}

/// All below a folder, links as links, with modes.
fn tree(folder: &Path) -> BTreeSet<String> {
    let find = Cmd::new("find")
        .arg(folder)
        .args(["-printf", "%P %y %m %l\\n"])
        .quiet();
    find.ok().stdout.lines().map(str::to_owned).collect()
}

fn install(env: &Env) -> Outcome {
    let prefix = env.mkdir("prefix");
    // What others have there stays.
    let foreign = prefix.join("share/man/man8");
    fs::create_dir_all(&foreign).expect("a folder of somebody else");
    fs::write(foreign.join("other.8"), "").expect("a file of somebody else");
    let before = tree(&prefix);
    let at = |path: &str| prefix.join(path);
    // Twice: the second one is an upgrade.
    for _ in 0..2 {
        script(env).arg("--prefix").arg(&prefix).ok();
    }
    for helper in braidfs_tests::machine::HELPERS {
        let link = fs::read_link(at(&format!("sbin/{helper}.braidfs")));
        assert_eq!(link.expect("a helper's name"), at("bin/braidfs"));
    }
    for file in [
        "lib/systemd/system/braidfs@.service",
        "lib/udev/rules.d/64-braidfs.rules",
        "share/bash-completion/completions/braidfs",
        "share/braidfs/grafana.json",
        "share/fish/vendor_completions.d/braidfs.fish",
        "share/man/man1/braidfs.1",
        "share/man/man5/braidfs.5",
        "share/man/man8/braidfs-mount.8",
        "share/man/man8/mount.braidfs.8",
        "share/zsh/site-functions/_braidfs",
    ] {
        let mode = fs::metadata(at(file)).expect(file).permissions().mode();
        assert_eq!(mode & 0o777, 0o644, "{file}");
    }
    let program = format!("{} ", at("bin/braidfs").display());
    for file in [
        "systemd/system/braidfs@.service",
        "udev/rules.d/64-braidfs.rules",
    ] {
        assert!(read(&at("lib").join(file)).contains(&program), "{file}");
    }
    // A file that was added later keeps its folder.
    let added = at("share/zsh/site-functions/_other");
    fs::write(&added, "").expect("a file of somebody else");
    let uninstall = || script(env).arg("--uninstall").arg("--prefix").arg(&prefix);
    uninstall().ok();
    assert!(added.exists());
    fs::remove_file(&added).expect("remove it");
    for folder in ["share/zsh/site-functions", "share/zsh"] {
        fs::remove_dir(at(folder)).expect("its folder was left");
    }
    assert_eq!(tree(&prefix), before);
    let output = uninstall().fails();
    assert!(
        output.stderr.contains("nothing is installed"),
        "{}",
        output.describe()
    );
    Ok(())
}

fn works(env: &Env) -> Outcome {
    let root = env.mkdir("root");
    script(env)
        .args(["--prefix", "/usr", "--root"])
        .arg(&root)
        .ok();
    let links = fs::read_link(root.join("sbin/mount.braidfs")).expect("a helper's name");
    assert_eq!(links, Path::new("/usr/bin/braidfs"));
    let program = root.join("usr/bin/braidfs");
    assert!(
        Cmd::new(&program)
            .arg("--version")
            .ok()
            .stdout
            .starts_with("braidfs ")
    );
    if env.need_tools(&["man"]).is_ok() {
        for (section, page) in [("1", "braidfs"), ("5", "braidfs"), ("8", "mount.braidfs")] {
            let man = Cmd::new("man").env("MANPAGER", "cat").env("MANWIDTH", "80");
            let man = man.arg("-M").arg(root.join("usr/share/man"));
            let text = man.args([section, page]).ok().stdout;
            assert!(text.contains("SEE ALSO"), "{text}");
        }
    }
    let uninstall = script(env).args(["--uninstall", "--prefix", "/usr", "--root"]);
    uninstall.arg(&root).ok();
    assert_eq!(tree(&root).len(), 1, "{:?}", tree(&root));
    Ok(())
}

fn debian(env: &Env) -> Outcome {
    env.need_tools(&["dpkg-deb"])?;
    let folder = env.mkdir("packages");
    script(env).arg("--deb").arg(&folder).limit_secs(110).ok();
    let packages = fs::read_dir(&folder).expect("the folder").flatten();
    let packages: Vec<PathBuf> = packages.map(|entry| entry.path()).collect();
    assert_eq!(packages.len(), 1, "{packages:?}");
    let field = |name: &str| {
        let field = Cmd::new("dpkg-deb")
            .arg("--field")
            .arg(&packages[0])
            .arg(name);
        field.ok().stdout.trim().to_owned()
    };
    assert_eq!(field("Package"), "braidfs");
    assert_eq!(field("Version"), env!("CARGO_PKG_VERSION"));
    assert!(field("Depends").contains("libc6 (>= 2."));
    let root = env.path("root");
    let extract = Cmd::new("dpkg-deb").arg("--extract").arg(&packages[0]);
    extract.arg(&root).ok();
    let program = root.join("usr/bin/braidfs");
    assert!(
        Cmd::new(program)
            .arg("--version")
            .ok()
            .stdout
            .starts_with("braidfs ")
    );
    let files = tree(&root);
    for file in [
        "usr/sbin/mount.fuse.braidfs l 777 /usr/bin/braidfs",
        "usr/lib/systemd/system/braidfs@.service f 644 ",
        "usr/lib/udev/rules.d/64-braidfs.rules f 644 ",
        "usr/share/man/man8/braidfs-mount.8.gz f 644 ",
        "usr/share/doc/braidfs/copyright f 644 ",
    ] {
        assert!(files.contains(file), "no {file}: {files:#?}");
    }
    Ok(())
}

fn wrong_usage(env: &Env) -> Outcome {
    let script = || Cmd::new(project_root().join("scripts/install"));
    for args in [&["--no-such-option"][..], &["--prefix"], &["file"]] {
        let output = script().args(args).fails();
        assert_eq!(output.status.code(), Some(2), "{}", output.describe());
        assert!(output.stderr.contains("--help"), "{}", output.describe());
    }
    let none = env.path("none");
    let output = script()
        .arg("--binary")
        .arg(&none)
        .arg("--prefix")
        .arg(&env.dir)
        .fails();
    assert!(output.stderr.contains("none"), "{}", output.describe());
    assert_eq!(tree(&env.dir).len(), 1);
    Ok(())
}
