//! The interfaces are a promise: old clients and servers must go on understanding new ones.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use prost::Message;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorSet};

fn golden_file() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden/isthmus.desc")
}

fn golden() -> FileDescriptorSet {
    FileDescriptorSet::decode(std::fs::read(golden_file()).expect("golden file").as_slice()).expect("descriptors")
}

fn current() -> FileDescriptorSet {
    FileDescriptorSet::decode(isthmus_proto::DESCRIPTORS).expect("descriptors")
}

/// What peers rely on: where it is, and what it is.
type Promises = BTreeMap<String, String>;

fn of_enum(path: &str, e: &EnumDescriptorProto, out: &mut Promises) {
    for value in &e.value {
        out.insert(format!("{path}.{} = {}", e.name(), value.number()), value.name().into());
    }
}

fn of_message(path: &str, m: &DescriptorProto, out: &mut Promises) {
    let path = format!("{path}.{}", m.name());
    out.insert(path.clone(), "message".into());
    for f in &m.field {
        let repeated = f.label() == Label::Repeated;
        let packed = f.options.as_ref().and_then(|o| o.packed);
        let group = f.oneof_index.map(|i| m.oneof_decl[i as usize].name().to_owned());
        let kind = match f.r#type() {
            Type::Message | Type::Enum => f.type_name().to_owned(),
            plain => plain.as_str_name().to_owned(),
        };
        let what = format!("{} {kind} repeated={repeated} packed={packed:?} oneof={group:?} optional={}", f.name(), f.proto3_optional());
        out.insert(format!("{path} field {}", f.number()), what);
    }
    m.nested_type.iter().for_each(|n| of_message(&path, n, out));
    m.enum_type.iter().for_each(|e| of_enum(&path, e, out));
}

fn promises(set: &FileDescriptorSet) -> Promises {
    let mut out = Promises::new();
    for file in &set.file {
        let package = file.package();
        file.message_type.iter().for_each(|m| of_message(package, m, &mut out));
        file.enum_type.iter().for_each(|e| of_enum(package, e, &mut out));
        for service in &file.service {
            for m in &service.method {
                let what = format!("{} -> {} streaming={}/{}", m.input_type(), m.output_type(), m.client_streaming(), m.server_streaming());
                out.insert(format!("{package}.{}/{}", service.name(), m.name()), what);
            }
        }
    }
    out
}

/// Everything that was promised and is not there any more, or is something else.
fn broken(old: &FileDescriptorSet, new: &FileDescriptorSet) -> BTreeSet<String> {
    let new = promises(new);
    let old = promises(old);
    old.into_iter()
        .filter(|(at, what)| new.get(at) != Some(what))
        .map(|(at, what)| format!("{at}: {what}, now {:?}", new.get(&at)))
        .collect()
}

/// Never to be met by changing the golden file.
#[test]
fn what_was_promised_is_kept() {
    let broken = broken(&golden(), &current());
    assert!(broken.is_empty(), "old clients and servers would no longer be understood:\n{broken:#?}");
}

/// What is new becomes a promise.
#[test]
fn the_descriptor_set_is_the_golden_one() {
    let golden = golden_file();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        let broken = broken(&self::golden(), &current());
        assert!(broken.is_empty(), "not written: it breaks\n{broken:#?}");
        std::fs::write(&golden, isthmus_proto::DESCRIPTORS).expect("golden file");
    }
    let expected = std::fs::read(&golden).expect("golden file");
    assert!(expected == isthmus_proto::DESCRIPTORS, "the .proto files have something new: run this test with UPDATE_GOLDEN=1");
}

/// The comparison sees what would break peers, and lets additions pass.
#[test]
fn breaking_changes_are_found() {
    let old = current();
    let change = |f: &dyn Fn(&mut FileDescriptorSet)| {
        let mut new = current();
        f(&mut new);
        broken(&old, &new).len()
    };
    let at = old.file.iter().position(|f| f.package() == "isthmus.offload.v1").unwrap();
    let message = old.file[at].message_type.iter().position(|m| m.name() == "InferRequest").unwrap();
    assert_eq!(change(&|_| ()), 0);
    assert_eq!(change(&|s| s.file[at].message_type[message].field[0].number = Some(1999)), 1, "renumbered");
    assert_eq!(change(&|s| s.file[at].message_type[message].field[0].set_type(Type::Sfixed32)), 1, "another type");
    assert_eq!(change(&|s| s.file[at].message_type[message].field[0].set_label(Label::Repeated)), 1, "repeated");
    assert_eq!(change(&|s| drop(s.file[at].message_type[message].field.pop())), 1, "removed");
    assert_eq!(change(&|s| s.file[at].service[0].method[0].name = Some("Other".into())), 1, "a method of another name");
    assert_eq!(change(&|s| s.file[at].service[0].method[0].server_streaming = Some(true)), 1, "streams");
    assert!(change(&|s| s.file[at].package = Some("isthmus.offload.v2".into())) > 10, "another package");
    let added = |s: &mut FileDescriptorSet| {
        let mut field = s.file[at].message_type[message].field[0].clone();
        (field.number, field.name) = (Some(1999), Some("added".into()));
        s.file[at].message_type[message].field.push(field);
    };
    assert_eq!(change(&added), 0);
}
