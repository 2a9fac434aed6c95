//! `braidfs generate-manual DIR`: man pages and shell completions, made from the definitions of the
//! commands. For `scripts/install` and packagers; `--help` does not show it.
//!
//! | written below DIR | what |
//! | --- | --- |
//! | `man/man1` | `braidfs`, and the commands that only look |
//! | `man/man5` | the file system for administrators: devices, fstab, mount options |
//! | `man/man8` | the other commands, and the names that mount(8) and fsck(8) call |
//! | `completions/` | one file for bash, zsh, fish each, by the name that the shell expects |

mod text;

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::{Command, CommandFactory};
use clap_complete::aot::{Shell, generate};
use clap_mangen::Man;

use super::devices::io_text;
use super::exit::{self, CliError};
use super::{Cli, mount};
use text::{MOUNT_OPTIONS, escape};

/// The word by which the program is told to do this.
pub const VERB: &str = "generate-manual";

/// Commands whose pages are in section 1: everybody may use them, and they change nothing.
const USER_COMMANDS: [&str; 7] = ["bench", "doctor", "info", "probe", "stats", "top", "trace"];

/// Pages of other names for commands.
const HELPERS: [(&str, &str); 4] = [
    ("mkfs.braidfs", "braidfs-mkfs"),
    ("umount.braidfs", "braidfs-umount"),
    ("fsck.braidfs", "braidfs-fsck"),
    ("mount.fuse.braidfs", "mount.braidfs"),
];

/// Write man pages and shell completions.
#[derive(clap::Parser, Debug)]
#[command(name = "braidfs generate-manual")]
pub struct ManualArgs {
    /// Made if it does not exist
    #[arg(value_name = "DIR")]
    directory: OsString,
}

/// `braidfs generate-manual`.
pub fn run(args: &ManualArgs) -> Result<(), CliError> {
    let directory = Path::new(&args.directory);
    let written = pages().and_then(|pages| {
        for (path, page) in pages.into_iter().chain(completions()) {
            let path = directory.join(path);
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            fs::write(path, page)?;
        }
        Ok(())
    });
    written.map_err(|error| exit::usage(format!("{}: {}", directory.display(), io_text(&error))))
}

/// The whole definition, complete.
fn definition() -> Command {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    command
}

fn section_of(verb: &str) -> &'static str {
    match USER_COMMANDS.contains(&verb) {
        true => "1",
        false => "8",
    }
}

/// Pages by their paths.
fn pages() -> io::Result<Vec<(PathBuf, Vec<u8>)>> {
    let command = definition();
    let mut pages = vec![
        page("braidfs", "1", overview(&command)?),
        page("braidfs", "5", volume_page().into_bytes()),
    ];
    for verb in command.get_subcommands() {
        let (name, section) = (verb.get_name(), section_of(verb.get_name()));
        let title = format!("braidfs-{name}");
        let page_of_verb = verb_page(verb.clone(), &title, section, text::exit_status(name))?;
        pages.push(page(&title, section, page_of_verb));
    }
    let helper = mount::HelperArgs::command();
    let helper = verb_page(helper, "mount.braidfs", "8", text::exit_status("mount"))?;
    pages.push(page("mount.braidfs", "8", helper));
    for (name, target) in HELPERS {
        let link = format!(".so man8/{target}.8\n");
        pages.push(page(name, "8", link.into_bytes()));
    }
    Ok(pages)
}

fn page(name: &str, section: &str, text: Vec<u8>) -> (PathBuf, Vec<u8>) {
    let path = format!("man/man{section}/{name}.{section}");
    (PathBuf::from(path), text)
}

fn man(command: Command, title: &str, section: &str) -> Man {
    Man::new(command)
        .title(title)
        .section(section)
        .source(format!("braidfs {}", env!("CARGO_PKG_VERSION")))
        .manual("braidfs")
}

/// The page of one command.
fn verb_page(verb: Command, title: &str, section: &str, exit: &str) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let man = man(verb, title, section);
    man.render_title(&mut out)?;
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    man.render_description_section(&mut out)?;
    man.render_options_section(&mut out)?;
    write_section(&mut out, "EXIT STATUS", exit)?;
    let also = "braidfs(1), braidfs(5), mount(8), fstab(5)";
    write_section(&mut out, "SEE ALSO", also)?;
    Ok(out)
}

/// The page of the program, with a list of its commands.
fn overview(command: &Command) -> io::Result<Vec<u8>> {
    let mut out = Vec::new();
    let man = man(command.clone(), "braidfs", "1");
    man.render_title(&mut out)?;
    man.render_name_section(&mut out)?;
    man.render_synopsis_section(&mut out)?;
    write_section(&mut out, "DESCRIPTION", text::OVERVIEW)?;
    man.render_options_section(&mut out)?;
    writeln!(out, ".SH COMMANDS")?;
    for verb in command.get_subcommands() {
        let (name, about) = (verb.get_name(), verb.get_about());
        let about = about.map(ToString::to_string).unwrap_or_default();
        let section = section_of(name);
        let (name, about) = (
            escape(&format!("braidfs-{name}({section})")),
            escape(&about),
        );
        writeln!(out, ".TP\n{name}\n{about}")?;
    }
    write_section(&mut out, "ENVIRONMENT", text::ENVIRONMENT)?;
    write_section(&mut out, "SIGNALS", text::SIGNALS)?;
    write_section(&mut out, "FILES", text::FILES)?;
    write_section(&mut out, "SEE ALSO", "braidfs(5), mount(8), fuse(4)")?;
    Ok(out)
}

/// The page of the file system, in section 5.
fn volume_page() -> String {
    let version = env!("CARGO_PKG_VERSION");
    let mut out = format!(".TH braidfs 5 \"\" \"braidfs {version}\" \"braidfs\"\n");
    out.push_str(".SH NAME\nbraidfs \\- volumes, fstab lines and mount options of braidfs\n");
    for (heading, paragraphs) in text::VOLUME {
        section(&mut out, heading, paragraphs);
    }
    out.push_str(".SH MOUNT OPTIONS\n");
    for (name, meaning) in MOUNT_OPTIONS {
        let (name, meaning) = (escape(name), escape(meaning));
        out.push_str(&format!(".TP\n\\fB{name}\\fR\n{meaning}\n"));
    }
    section(&mut out, "GENERAL OPTIONS", text::GENERAL_OPTIONS);
    section(&mut out, "FILES", text::FILES);
    let also = "braidfs(1), braidfs-mount(8), mount(8), fstab(5), systemd.mount(5)";
    section(&mut out, "SEE ALSO", also);
    out
}

fn write_section(out: &mut Vec<u8>, heading: &str, paragraphs: &str) -> io::Result<()> {
    let mut text = String::new();
    section(&mut text, heading, paragraphs);
    out.write_all(text.as_bytes())
}

/// Paragraphs are separated by empty lines; lines that are indented stay as they are.
fn section(out: &mut String, heading: &str, paragraphs: &str) {
    out.push_str(&format!(".SH \"{heading}\"\n"));
    for (number, paragraph) in paragraphs.split("\n\n").enumerate() {
        if number > 0 {
            out.push_str(".PP\n");
        }
        let example = paragraph.starts_with("    ");
        if example {
            out.push_str(".nf\n");
        }
        for line in paragraph.lines() {
            out.push_str(&escape(line));
            out.push('\n');
        }
        if example {
            out.push_str(".fi\n");
        }
    }
}

fn completions() -> Vec<(PathBuf, Vec<u8>)> {
    let shells = [
        (Shell::Bash, "bash/braidfs"),
        (Shell::Zsh, "zsh/_braidfs"),
        (Shell::Fish, "fish/braidfs.fish"),
    ];
    let script = |(shell, name): (Shell, &str)| {
        let mut script = Vec::new();
        generate(shell, &mut Cli::command(), "braidfs", &mut script);
        (Path::new("completions").join(name), script)
    };
    shells.into_iter().map(script).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::options::ParsedOptions;

    /// Quoted words of the arms in which options are told apart, so that none is forgotten.
    fn options_in_source() -> Vec<String> {
        let source = include_str!("options.rs");
        let begin = source.find("fn take_flag").unwrap();
        let end = source.find("pub fn settle_access").unwrap();
        let mut names = Vec::new();
        for line in source[begin..end].lines() {
            // The arms of the outer match, as rustfmt indents them.
            let arm = line.strip_prefix("            ").unwrap_or_default();
            if arm.starts_with('"') || arm.starts_with("| \"") {
                let pattern = arm.split(" if ").next().unwrap_or_default();
                let pattern = pattern.split("=>").next().unwrap_or_default();
                names.extend(pattern.split('"').skip(1).step_by(2).map(str::to_owned));
            }
        }
        names
    }

    #[test]
    fn every_mount_option_is_explained() {
        let names = options_in_source();
        assert!(names.len() > 50, "{names:?}");
        let page = volume_page().replace("\\fB", " ");
        for name in names {
            let known = page
                .split(|char: char| !char.is_ascii_alphanumeric() && char != '_')
                .any(|word| word == name);
            assert!(known, "braidfs(5) does not explain '{name}'");
        }
    }

    #[test]
    fn every_explained_option_exists() {
        for (names, _) in MOUNT_OPTIONS {
            for name in names.split(", ") {
                let sample = match name.split_once('=') {
                    None => name.to_owned(),
                    Some((name, "SECONDS" | "N")) => format!("{name}=5"),
                    Some((name, "SIZE")) => format!("{name}=32M"),
                    Some((name, "ADDRESS")) => format!("{name}=[::1]:9421"),
                    Some((name, "DIR:...")) => format!("{name}=/a:/b"),
                    Some((name, value)) => {
                        format!("{name}={}", value.split('|').next().unwrap_or_default())
                    }
                };
                let parsed = ParsedOptions::parse(std::slice::from_ref(&sample), false);
                assert!(parsed.is_ok(), "{sample}: {parsed:?}");
            }
        }
    }

    #[test]
    fn every_command_and_option_has_its_place() {
        let pages = pages().unwrap();
        for verb in definition().get_subcommands() {
            let (name, section) = (verb.get_name(), section_of(verb.get_name()));
            let path = format!("man/man{section}/braidfs-{name}.{section}");
            let page = pages.iter().find(|(at, _)| *at == Path::new(&path));
            let page = String::from_utf8(page.unwrap().1.clone()).unwrap();
            let page = page.replace("\\-", "-");
            for arg in verb.get_arguments().filter(|arg| !arg.is_hide_set()) {
                let long = arg.get_long().map(|long| format!("--{long}"));
                let short = arg.get_short().map(|short| format!("-{short}"));
                for option in long.into_iter().chain(short) {
                    assert!(page.contains(&option), "{path} lacks {option}");
                }
            }
        }
    }
}
