//! Reader of torch's legacy (pre-zip) `.pth` container.
//!
//! The file is a sequence of pickles (magic, protocol, system information, the state dict, the list
//! of storage keys) followed, per key, by an int64 element count and raw little-endian data. Only the
//! opcodes and the two constructors that a state dict needs are understood, so no code can run; the
//! tensors' strides are honoured (many tensors of the EfficientNet-Lite files are not contiguous).

use std::collections::HashMap;

use crate::NetError;

const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const PROTOCOL: i64 = 1001;
/// Nothing in a backbone pushes more than this,
const MAX_STACK: usize = 1 << 16;
/// nests deeper,
const MAX_DEPTH: usize = 8;
/// or takes more opcodes.
const MAX_OPCODES: usize = 1 << 20;

/// A dense tensor read from a file: row-major values and shape.
#[derive(Debug, Clone, PartialEq)]
pub struct RawTensor {
    /// Row-major elements, `shape.iter().product()` of them.
    pub data: Vec<f32>,
    /// Extents; empty for a scalar.
    pub shape: Vec<usize>,
}

#[derive(Debug, Clone)]
enum Value {
    Mark,
    None,
    Int(i64),
    Magic,
    Text(String),
    Seq(Vec<Value>),
    Dict(Vec<(Value, Value)>),
    Global(String),
    Storage(String),
    Tensor { storage: String, offset: usize, size: Vec<usize>, stride: Vec<usize> },
}

#[derive(Clone, Copy, PartialEq)]
enum Element {
    F32,
    I64,
}

impl Element {
    fn width(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::I64 => 8,
        }
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    opcodes: usize,
    storages: HashMap<String, (Element, usize)>,
}

fn bad(why: impl Into<String>) -> NetError {
    NetError::format("legacy .pth file", why)
}

impl<'a> Reader<'a> {
    fn take(&mut self, n: usize) -> Result<&'a [u8], NetError> {
        let end = self.at.checked_add(n).filter(|&e| e <= self.bytes.len());
        let end = end.ok_or_else(|| bad(format!("ends early: {n} more bytes expected at offset {}", self.at)))?;
        let part = &self.bytes[self.at..end];
        self.at = end;
        Ok(part)
    }

    fn byte(&mut self) -> Result<u8, NetError> {
        Ok(self.take(1)?[0])
    }

    fn u32(&mut self) -> Result<u32, NetError> {
        let b = self.take(4)?;
        Ok(u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn line(&mut self) -> Result<String, NetError> {
        let rest = &self.bytes[self.at..];
        let end = rest.iter().position(|&b| b == b'\n').ok_or_else(|| bad("unterminated line"))?;
        let text = String::from_utf8_lossy(&rest[..end]).into_owned();
        self.at += end + 1;
        Ok(text)
    }

    fn text(&mut self, n: usize) -> Result<Value, NetError> {
        let raw = self.take(n)?;
        Ok(Value::Text(String::from_utf8(raw.to_vec()).map_err(|_| bad("string is not UTF-8"))?))
    }

    /// Runs one pickle up to its STOP opcode.
    fn pickle(&mut self) -> Result<Value, NetError> {
        let mut stack: Vec<Value> = Vec::new();
        let mut memo: HashMap<u32, Value> = HashMap::new();
        let start = self.opcodes;
        loop {
            self.opcodes += 1;
            if stack.len() > MAX_STACK || memo.len() > MAX_STACK || self.opcodes - start > MAX_OPCODES {
                return Err(bad("pickle is larger than any backbone's"));
            }
            let op = self.byte()?;
            match op {
                0x80 => {
                    self.byte()?;
                }
                b'.' => return pop(&mut stack),
                b'(' => stack.push(Value::Mark),
                b'N' => stack.push(Value::None),
                0x88 => stack.push(Value::Int(1)),
                0x89 => stack.push(Value::Int(0)),
                b'K' => {
                    let v = self.byte()?;
                    stack.push(Value::Int(v.into()));
                }
                b'M' => {
                    let b = self.take(2)?;
                    stack.push(Value::Int(u16::from_le_bytes([b[0], b[1]]).into()));
                }
                b'J' => {
                    let v = self.u32()? as i32;
                    stack.push(Value::Int(v.into()));
                }
                0x8a => {
                    let n = self.byte()? as usize;
                    let raw = self.take(n)?;
                    stack.push(long(raw)?);
                }
                b'X' => {
                    let n = self.u32()? as usize;
                    let v = self.text(n)?;
                    stack.push(v);
                }
                b'U' => {
                    let n = self.byte()? as usize;
                    let v = self.text(n)?;
                    stack.push(v);
                }
                b'c' => {
                    let name = format!("{}.{}", self.line()?, self.line()?);
                    stack.push(Value::Global(name));
                }
                b'q' | b'r' => {
                    let slot = if op == b'q' { self.byte()?.into() } else { self.u32()? };
                    let top = stack.last().cloned().ok_or_else(|| bad("memo of an empty stack"))?;
                    memo.insert(slot, memoised(top));
                }
                b'h' | b'j' => {
                    let slot = if op == b'h' { self.byte()?.into() } else { self.u32()? };
                    stack.push(memo.get(&slot).cloned().ok_or_else(|| bad("unknown memo slot"))?);
                }
                b')' | b']' => stack.push(Value::Seq(Vec::new())),
                b'}' => stack.push(Value::Dict(Vec::new())),
                b't' => {
                    let items = pop_mark(&mut stack)?;
                    stack.push(sequence(items)?);
                }
                0x85..=0x87 => {
                    let n = (op - 0x84) as usize;
                    let from = stack.len().checked_sub(n).ok_or_else(|| bad("tuple from a short stack"))?;
                    let items = stack.split_off(from);
                    stack.push(sequence(items)?);
                }
                b'e' | b'a' => {
                    let items = if op == b'e' { pop_mark(&mut stack)? } else { vec![pop(&mut stack)?] };
                    match stack.last_mut() {
                        Some(Value::Seq(list)) if items.iter().all(|v| v.depth() < MAX_DEPTH) => list.extend(items),
                        _ => return Err(bad("append to something that is no list")),
                    }
                }
                b'u' | b's' => {
                    let items = if op == b'u' {
                        pop_mark(&mut stack)?
                    } else {
                        let value = pop(&mut stack)?;
                        vec![pop(&mut stack)?, value]
                    };
                    let Some(Value::Dict(dict)) = stack.last_mut() else {
                        return Err(bad("items set on something that is no dictionary"));
                    };
                    let mut items = items.into_iter();
                    while let (Some(k), Some(v)) = (items.next(), items.next()) {
                        dict.push((k, v));
                    }
                }
                b'Q' => {
                    let id = pop(&mut stack)?;
                    let v = self.persistent(id)?;
                    stack.push(v);
                }
                b'R' => {
                    let args = pop(&mut stack)?;
                    let callee = pop(&mut stack)?;
                    stack.push(call(callee, args)?);
                }
                b'b' => {
                    // BUILD: attributes of the state dict (its version metadata), not needed
                    pop(&mut stack)?;
                }
                other => return Err(bad(format!("pickle opcode 0x{other:02x} at offset {}", self.at - 1))),
            }
        }
    }

    /// `('storage', type, key, location, element count, view)`.
    fn persistent(&mut self, id: Value) -> Result<Value, NetError> {
        let Value::Seq(parts) = id else { return Err(bad("persistent id is no tuple")) };
        let [Value::Text(tag), Value::Global(kind), Value::Text(key), _, Value::Int(count), ..] = &parts[..] else {
            return Err(bad("persistent id has another form than a storage"));
        };
        if tag != "storage" {
            return Err(bad(format!("persistent id '{tag}'")));
        }
        let element = match kind.as_str() {
            "torch.FloatStorage" => Element::F32,
            "torch.LongStorage" => Element::I64,
            other => return Err(bad(format!("storage type {other} is not supported"))),
        };
        let count = usize::try_from(*count).map_err(|_| bad("negative storage size"))?;
        self.storages.insert(key.clone(), (element, count));
        Ok(Value::Storage(key.clone()))
    }
}

/// Containers are memoised empty (they are filled through the stack); sharing them is not needed here.
fn memoised(value: Value) -> Value {
    match value {
        Value::Dict(_) => Value::Dict(Vec::new()),
        other => other,
    }
}

/// A tuple, unless it nests too deeply.
fn sequence(items: Vec<Value>) -> Result<Value, NetError> {
    if items.iter().any(|v| v.depth() >= MAX_DEPTH) {
        return Err(bad("pickle nests deeper than any backbone's"));
    }
    Ok(Value::Seq(items))
}

impl Value {
    /// Levels of nested sequences; at most [`MAX_DEPTH`], since nothing deeper is ever built.
    fn depth(&self) -> usize {
        match self {
            Self::Seq(items) => 1 + items.iter().map(Self::depth).max().unwrap_or(0),
            _ => 0,
        }
    }
}

fn pop(stack: &mut Vec<Value>) -> Result<Value, NetError> {
    stack.pop().ok_or_else(|| bad("pop from an empty stack"))
}

fn pop_mark(stack: &mut Vec<Value>) -> Result<Vec<Value>, NetError> {
    let mark = stack.iter().rposition(|v| matches!(v, Value::Mark)).ok_or_else(|| bad("no mark on the stack"))?;
    let items = stack.split_off(mark + 1);
    stack.pop();
    Ok(items)
}

fn long(raw: &[u8]) -> Result<Value, NetError> {
    if raw == MAGIC {
        return Ok(Value::Magic);
    }
    if raw.len() > 8 {
        return Err(bad("integer wider than 64 bits"));
    }
    let negative = raw.last().is_some_and(|b| b & 0x80 != 0);
    let mut wide = [if negative { 0xff } else { 0 }; 8];
    wide[..raw.len()].copy_from_slice(raw);
    Ok(Value::Int(i64::from_le_bytes(wide)))
}

fn extents(value: &Value) -> Result<Vec<usize>, NetError> {
    let Value::Seq(items) = value else { return Err(bad("shape is no tuple")) };
    let one = |v: &Value| match v {
        Value::Int(n) => usize::try_from(*n).map_err(|_| bad("negative extent")),
        _ => Err(bad("extent is no integer")),
    };
    items.iter().map(one).collect()
}

fn call(callee: Value, args: Value) -> Result<Value, NetError> {
    let (Value::Global(name), Value::Seq(args)) = (callee, args) else {
        return Err(bad("call of something that is no constructor"));
    };
    match (name.as_str(), &args[..]) {
        ("collections.OrderedDict", []) => Ok(Value::Dict(Vec::new())),
        ("torch._utils._rebuild_tensor_v2", [Value::Storage(key), Value::Int(offset), size, stride, ..]) => {
            let offset = usize::try_from(*offset).map_err(|_| bad("negative offset"))?;
            let (size, stride) = (extents(size)?, extents(stride)?);
            if size.len() != stride.len() {
                return Err(bad("size and stride differ in length"));
            }
            Ok(Value::Tensor { storage: key.clone(), offset, size, stride })
        }
        _ => Err(bad(format!("call of {name} is not allowed"))),
    }
}

/// Copies a strided view of `storage` into row-major order.
fn gather(storage: &[f32], offset: usize, size: &[usize], stride: &[usize]) -> Option<Vec<f32>> {
    let count = size.iter().try_fold(1usize, |a, &b| a.checked_mul(b))?;
    if count > storage.len() {
        return None;
    }
    let mut out = Vec::with_capacity(count);
    let mut index = vec![0usize; size.len()];
    for _ in 0..count {
        let mut at = offset;
        for (i, s) in index.iter().zip(stride) {
            at = at.checked_add(i.checked_mul(*s)?)?;
        }
        out.push(*storage.get(at)?);
        for d in (0..size.len()).rev() {
            index[d] += 1;
            if index[d] < size[d] {
                break;
            }
            index[d] = 0;
        }
    }
    Some(out)
}

/// Reads every floating-point tensor of a legacy `.pth` state dict, in file order.
/// Integer tensors (batch counters) are skipped.
///
/// # Errors
/// [`NetError::Format`] names what is wrong and where; no allocation exceeds a small multiple of `bytes`.
pub fn read(bytes: &[u8]) -> Result<Vec<(String, RawTensor)>, NetError> {
    let mut r = Reader { bytes, at: 0, opcodes: 0, storages: HashMap::new() };
    if !matches!(r.pickle()?, Value::Magic) {
        return Err(bad("wrong magic: not torch's legacy container"));
    }
    if !matches!(r.pickle()?, Value::Int(PROTOCOL)) {
        return Err(bad("unknown protocol version"));
    }
    r.pickle()?;
    let Value::Dict(entries) = r.pickle()? else { return Err(bad("state dict is no dictionary")) };
    let Value::Seq(keys) = r.pickle()? else { return Err(bad("storage key list is no list")) };

    let mut storages: HashMap<String, Vec<f32>> = HashMap::new();
    for key in keys {
        let Value::Text(key) = key else { return Err(bad("storage key is no string")) };
        let (element, declared) = *r.storages.get(&key).ok_or_else(|| bad(format!("storage {key} was not declared")))?;
        let b = r.take(8)?;
        let count = u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
        if count != declared as u64 {
            return Err(bad(format!("storage {key} has {count} elements, {declared} were declared")));
        }
        let size = declared.checked_mul(element.width()).ok_or_else(|| bad("storage size overflows"))?;
        let raw = r.take(size)?;
        if element == Element::F32 {
            let values = raw.chunks_exact(4).map(|c| f32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
            storages.insert(key, values);
        }
    }
    if r.at != bytes.len() {
        return Err(bad(format!("{} bytes follow the last storage", bytes.len() - r.at)));
    }

    let mut out = Vec::new();
    let mut total = 0usize;
    for (name, value) in entries {
        let (Value::Text(name), Value::Tensor { storage, offset, size, stride }) = (name, value) else {
            return Err(bad("state dict entry is no named tensor"));
        };
        let Some(values) = storages.get(&storage) else { continue };
        let data = gather(values, offset, &size, &stride).ok_or_else(|| bad(format!("tensor {name} reaches outside its storage")))?;
        total += data.len();
        if total > bytes.len() {
            return Err(bad("tensors share storages so that they outgrow the file"));
        }
        out.push((name, RawTensor { data, shape: size }));
    }
    Ok(out)
}
