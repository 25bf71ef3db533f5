"""ptx2cpp.py [--export] in.ptx > out.cpp: PTX of nvcc or Triton as C++ for the emulator runtime (ptx_rt.h).

Covers the instructions met in our kernels; an unknown one is an error that names it, not a guess.
--export: kernels become C functions ptx_NAME (with ptx_NAME_threads) instead of replacing g++'s at launch.
Build with -ffp-contract=off. `.loc` lines (nvcc -lineinfo) become #line, so reports name .cu lines.
"""
import contextlib, io, math, re, sys

TYPES = {"pred": "bool", "b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64", "f32": "float", "f64": "double", "f16": "u16", "u16": "u16", "u32": "u32", "u64": "u64", "s32": "u32", "s64": "u64"}
SPECIAL = {f"%{p}.{d}": f"emu::cur->{f}.{d}" for p, f in (("tid", "tid"), ("ctaid", "bid"), ("ntid", "bdim"), ("nctaid", "gdim")) for d in "xyz"}
SPECIAL["%laneid"] = "emu::cur->lane"
CMP = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


def unmangle_anon(s):  # nvcc names anonymous namespaces by file; g++ doesn't
    def f(m):
        n = int(m.group(1))
        return "12_GLOBAL__N_1" + m.group(2)[n:]
    return re.sub(r"(\d+)(_GLOBAL__N__\w*)", f, s)


def ident(s):
    return "v" + re.sub(r"\W", "_", s.lstrip("%$"))  # %f32 is a register, f32 a type


class Kernel:
    def __init__(self, shared):
        self.shared, self.used, self.params, self.out, self.n = shared, set(), {}, [], 0
        self.local32 = ""  # the stack array, where LLVM uses 32-bit offsets in it

    def val(self, x, t=None):
        x = x.strip()
        if x in SPECIAL:
            v = SPECIAL[x]
        elif m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", x):
            v = f"as<float>(0x{m.group(1)}u)"
        elif m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", x):
            v = f"as<double>(0x{m.group(1)}ull)"
        elif re.fullmatch(r"-?\d+|0x[0-9a-fA-F]+", x):
            return f"(({t or 's64'}){x}ll)"
        elif x in self.params:
            v = f"(u64)argv[{self.params[x]}]"
        elif x in self.shared:
            self.used.add(x)
            v = ident(x)
        else:
            v = ident(x)
        return f"as<{t}>({v})" if t else v

    def addr(self, op, space):
        m = re.fullmatch(r"\[\s*([^+\]\s]+)\s*(?:\+\s*(-?\w+)\s*)?\]", op.strip())
        base, off = m.group(1), m.group(2) or "0"
        if space == "shared":
            return f"at_shared(as<u32>({self.val(base)}) + ({off}))"
        if space == "local" and self.local32: return f"{self.local32} + as<u32>({self.val(base)}) + ({off})"
        return f"at(as<u64>({self.val(base)}) + ({off}))"

    def ins(self, op, a):
        """C++ for one instruction; a: operand strings."""
        self.n += 1
        HERE = f"__FILE__, __LINE__ | {self.n} << 16"  # line for people, number to tell instructions apart
        op = op.replace("shared::cta", "shared")
        p, v = op.split("."), self.val
        if any(q in ("sat", "satfinite", "relu", "xorsign") or q.startswith("shared::") for q in p): raise KeyError(op)
        o, t = p[0], p[-1]
        if t.startswith("b") and t != "bf16": t = "u" + t[1:]
        dst = ident(a[0]) if a else ""
        put = lambda e: f"set({dst}, {e});"
        x = lambda i, ty=None: v(a[i], ty or t)
        lst = lambda s: [e.strip() for e in s.strip()[1:-1].split(",")]
        if o in ("min", "max") and len(a) == 4 and t == "f32" and "NaN" not in p: return put(f"std::f{o}(std::f{o}({x(1)}, {x(2)}), {x(3)})")  # sm_100
        arity = {"add": 3, "sub": 3, "mul": 3, "div": 3, "and": 3, "or": 3, "xor": 3, "min": 3, "max": 3, "fma": 4, "mad": 4, "neg": 2, "abs": 2, "ex2": 2}
        if arity.get(o, len(a)) != len(a): raise KeyError(op)  # e.g. a third operand that would be dropped silently
        if p[-1].removesuffix("x2") in ("bf16", "f16") and o in ("add", "sub", "mul", "fma") and p[-2] != "f32":
            T, fn = "bf16" if p[-1][0] == "b" else "__half", {"add": "a + b", "sub": "a - b", "mul": "a * b", "fma": "std::fma(a, b, c)"}[o]
            r = "u32" if p[-1].endswith("x2") else "u16"
            return put(f"halves<{T}, {r}>([](float a, float b, [[maybe_unused]] float c) {{ return {fn}; }}, {', '.join(v(e, r) for e in a[1:])})")
        if t in ("bf16", "f16") and o not in ("cvt", "mma", "wgmma"):  # sm_100 mixes types: d = a - c, d = a * b + c with a, b in 16 bits
            if p[-2] != "f32" or o not in ("add", "sub", "fma"): raise KeyError(op)
            h = [f"(float)as<{'bf16' if t == 'bf16' else '__half'}>({v(e)})" for e in a[1:-1]] + [v(a[-1], "float")]
            return put(f"std::fma({', '.join(h)})" if o == "fma" else f"{h[0]} {'+' if o == 'add' else '-'} {h[1]}")
        if t == "f32x2":  # sm_100: two floats in a 64-bit register
            fn = {"add": "a + b", "sub": "a - b", "mul": "a * b", "fma": "std::fma(a, b, c)"}[o]
            args = [v(e, "u64") for e in a[1:]] + ["0"] * (4 - len(a))
            return put(f"each2([](float a, float b, [[maybe_unused]] float c) {{ return {fn}; }}, {', '.join(args)})")
        if t.endswith("x2") and o not in ("cvt", "mma"): raise KeyError(op)
        if "cc" in p or o in ("addc", "subc", "madc"):  # carry chains
            e = f"(u64){x(1, 'u32')} {'-' if o[:3] == 'sub' else '+'} {x(2, 'u32')}" if o[:3] != "mad" else \
                f"(u32)((u64){x(1, 'u32')} * {x(2, 'u32')} >> {32 if 'hi' in p else 0}) + (u64){x(3, 'u32')}"
            if t != "u32": raise KeyError(op)
            return f"{{ u64 w = {e} {('-' if o == 'subc' else '+') + ' cc' if o[-1] == 'c' else ''}; set({dst}, (u32)w); " + ("cc = w >> 32 & 1; " if "cc" in p else "") + "}"
        if o in ("add", "sub", "and", "or", "xor") or (o == "mul" and t[0] == "f") or (o == "mul" and "lo" in p) or o == "div":
            c = {"add": "+", "sub": "-", "and": "&", "or": "|", "xor": "^", "mul": "*", "div": "/"}[o]
            ty = "bool" if t == "pred" else t
            if ty[0] == "s" and o in ("add", "sub", "mul"): ty = "u" + ty[1:]  # wraps
            return put(f"({ty})({x(1, ty)} {c} {x(2, ty)})")
        if o == "mul" and "wide" in p:
            w = t[0] + str(int(t[1:]) * 2)
            return put(f"({w}){x(1)} * ({w}){x(2)}")
        if o == "mul" and "hi" in p: return put(f"({t})((__int128){x(1)} * {x(2)} >> {t[1:]})")
        if o == "mad" and "hi" in p: return put(f"(u{t[1:]})((__int128){x(1)} * {x(2)} >> {t[1:]}) + {x(3)}")
        if o == "mad": return put(f"(u{t[1:]})({x(1)} * {x(2)} + {x(3)})") if "lo" in p else put(f"({t[0]}64){x(1)} * {x(2)} + {v(a[3], t[0] + '64')}")
        if o == "fma": return put(f"std::fma({x(1)}, {x(2)}, {x(3)})")
        if o == "not": return put(f"!{x(1, 'bool')}" if t == "pred" else f"({t})~{x(1)}")
        if o == "neg": return put(f"({t})-{x(1)}")
        if o == "abs": return put(f"({t})std::abs({x(1)})")
        if o in ("min", "max") and "NaN" in p: return put(f"unordered({x(1)}, {x(2)}) ? as<f32>(0x7fffffffu) : std::f{o}({x(1)}, {x(2)})")
        if o in ("min", "max"): return put(f"std::f{o}({x(1)}, {x(2)})" if t[0] == "f" else f"std::{o}<{t}>({x(1)}, {x(2)})")
        if o in ("shl", "shr"): return put(f"{o}<{t}>({x(1)}, {v(a[2], 'u32')})")
        if o == "shf": return put(f"shf_{p[1]}({x(1)}, {x(2)}, std::min<u32>({v(a[3], 'u32')}{' & 31' if p[2] == 'wrap' else ''}, 32))")
        if o == "tanh": return put(f"std::tanh({x(1)})")
        if o == "clz": return put(f"({x(1)} ? (u32)__builtin_clz{'ll' if t == 'u64' else ''}({x(1)}) : {t[1:]}u)")
        if o == "rem": return put(f"({t})({x(1)} % {x(2)})")
        if o == "rcp": return put(f"1 / {x(1)}")
        if o == "rsqrt": return put(f"1 / std::sqrt({x(1)})")
        if o == "sqrt": return put(f"std::sqrt({x(1)})")
        if o == "ex2": return put(f"ptx::ex2({x(1)})")
        if o == "lg2": return put(f"std::log2({x(1)})")
        if o == "bfi": return put(f"bfi({x(1)}, {x(2)}, {v(a[3], 'u32')}, {v(a[4], 'u32')})")
        if o == "bfe": return put(f"bfe<{t}>({x(1)}, {v(a[2], 'u32')}, {v(a[3], 'u32')})")
        if o == "prmt": return put(f"prmt({x(1)}, {x(2)}, {x(3)})")
        if o == "popc": return put(f"(u32)__builtin_popcountll({x(1)})")
        if o == "selp": return put(f"{v(a[3])} ? {x(1)} : {x(2)}")
        if o == "setp":
            c, A, B = p[1], x(1), x(2)
            e = f"!unordered({A}, {B})" if c == "num" else f"unordered({A}, {B})" if c == "nan" else \
                f"(unordered({A}, {B}) || {A} {CMP[c[:2]]} {B})" if c.endswith("u") and t[0] == "f" else \
                f"(!unordered({A}, {B}) && {A} != {B})" if c == "ne" and t[0] == "f" else f"({A} {CMP[c]} {B})"
            if len(a) == 4: e += {"and": " & ", "or": " | ", "xor": " ^ "}[p[2]] + v(a[3])
            return f"{dst} = {e};"
        if o == "mov":
            n = int(t[1:]) if t != "pred" else 0
            if a[0].startswith("{"):
                d = lst(a[0])
                return " ".join(f"{ident(r)} = (u{n // len(d)})({v(a[1], t)} >> {n // len(d) * i});" for i, r in enumerate(d) if r != "_")
            if a[1].startswith("{"):
                s = lst(a[1])
                return put(" | ".join(f"({t})({t})(u{n // len(s)}){v(e)} << {n // len(s) * i}" for i, e in enumerate(s)))
            return f"{dst} = {v(a[1])};" if t == "pred" else put(v(a[1], t))
        if o == "cvta": return put(f"(u64)at_shared((u32){v(a[1])})" if p[1] == "shared" else f"(u64)emu::to_shared(at({v(a[1])}))" if p[1:3] == ["to", "shared"] else v(a[1], "u64"))
        if o == "cvt":
            d, s = p[-2], p[-1]
            f16 = {"bf16": "bf16", "f16": "__half"}
            if s == "bf16x2" or d == "bf16x2": return put(f"ptx::pack2<bf16>({v(a[2], 'float')}, {v(a[1], 'float')})")
            if d == "f16x2": return put(f"ptx::pack2<__half>({v(a[2], 'float')}, {v(a[1], 'float')})")
            if d == "tf32": return put(f"ptx::cvt_tf32({v(a[1], 'float')})")
            src = f"(float)as<{f16[s]}>({v(a[1])})" if s in f16 else v(a[1], s)
            if d in f16: return put(f"as<u16>({f16[d]}({src}))")
            if d[0] in "us" and s[0] == "f":
                fn = {"rni": "nearbyint", "rzi": "trunc", "rmi": "floor", "rpi": "ceil"}[next(q for q in p if q.endswith("i") and q[0] == "r")]
                return put(f"({d})std::min<double>(std::max<double>({fn}({src}), (double)std::numeric_limits<{d}>::min()), (double)std::numeric_limits<{d}>::max())")
            if d[0] == "f" and s[0] == "f" and (q := next((q for q in p if q in ("rni", "rzi", "rmi", "rpi")), "")):
                return put(f"({d}){dict(rni='nearbyint', rzi='trunc', rmi='floor', rpi='ceil')[q]}({src})")
            return put(f"({d}){src}")
        if o in ("ld", "st"):
            n = int(next((q[1:] for q in p if re.fullmatch(r"v\d", q)), 1))
            one = lambda e: lst(e)[0] if e.startswith("{") else e
            space = next((q for q in p if q in ("param", "global", "shared", "local")), "generic")
            if o == "ld":
                regs = lst(a[0]) if n > 1 else [one(a[0])]
                return f"{{ auto v = *(const Vec<{t}, {n}>*)({self.addr(a[1], space)}); " + " ".join(f"set({ident(r)}, v.v[{i}]);" for i, r in enumerate(regs) if r != "_") + " }"
            vals = lst(a[1]) if n > 1 else [one(a[1])]
            T = f"Vec<{t}, {n}>"
            same = "emu::about_to_store(p, &x, sizeof x); " if EXPORT and space == "shared" else ""
            return f"{{ auto p = ({T}*)({self.addr(a[0], space)}); {T} x{{{{{', '.join(v(e, t) for e in vals)}}}}}; {same}*p = x; }}"
        if o == "bra": return f"goto {ident(a[0])};"
        if o in ("ret", "exit"): return "return;"
        if op in ("bar.sync", "barrier.sync") and a == ["0"]: return f"emu::barrier(0, {HERE});"
        if op == "bar.warp.sync": return f"emu::sync_warp({v(a[0], 'u32')}, {HERE});"
        if o in ("membar", "fence"): return "__threadfence();"
        if o == "shfl":
            d, q = (a[0].split("|") + [None])[:2]
            return f"{{ bool q; set({ident(d)}, shfl({p[2]}, q, {v(a[1], 'u32')}, {v(a[2], 'u32')}, {v(a[3], 'u32')}, {v(a[4], 'u32')}, {HERE})); " + (f"{ident(q)} = q; " if q else "") + "}"
        if o == "vote":
            fn = {"ballot": "__ballot_sync", "any": "__any_sync", "all": "__all_sync"}[p[2]]
            return f"{dst} = {fn}({v(a[2], 'u32')}, {v(a[1])}, {HERE});"
        if o == "redux": return put(f"__reduce_{p[2]}_sync({v(a[2], 'u32')}, {v(a[1], 'u32')}, {HERE})")
        if o in ("atom", "red"):
            fn = "op_" + p[-2]
            a = a if o == "atom" else ["_"] + a
            e = f"atom<{t}>({self.addr(a[1], p[1])}, {v(a[2], t)}, {fn}(), {HERE})"
            return f"(void){e};" if a[0] == "_" else put(e)
        if op.startswith("cp.async.") and "shared" in p:
            return f"emu::cp_async({self.addr(a[0], 'shared')}, {self.addr(a[1], 'global')}, {a[2]}, {v(a[3], 'u32') if len(a) > 3 else a[2]}, {HERE});"
        if op == "cp.async.commit_group": return "emu::cp_async_commit();"
        if op == "cp.async.wait_group": return f"emu::cp_async_wait({a[0]});"
        if op == "cp.async.wait_all": return "emu::cp_async_wait(-1);"
        if o in ("ldmatrix", "stmatrix") and "m8n8" in p:
            load, n = o == "ldmatrix", int(next(q for q in p if q in ("x1", "x2", "x4"))[1])
            registers, address = (a[0], a[1]) if load else (a[1], a[0])
            values = "" if load else ", ".join(v(e, "u32") for e in lst(registers))
            model = f"{'ptx' if load else 'ptxrt'}::do_{o}<{'true' if 'trans' in p else 'false'}, {n}>"
            return (f"{{ ptx::LdMatrix m = {{{{{values}}}, {self.addr(address, 'shared')}}}; "
                    f"if (emu::cur->lane < {8 * n}) emu::check_access(m.row, 16, emu::{'READ' if load else 'WRITE'}, true, \"{o}\", {HERE}); "
                    f"emu::collective(\"{o}\", ~0u, true, {model}, &m, {HERE}); "
                    + " ".join(f"{ident(e)} = m.r[{i}];" for i, e in enumerate(lst(registers) if load else [])) + " }")
        if op == "wgmma.fence.sync.aligned": return ""
        if op == "wgmma.commit_group.sync.aligned": return "wg.commit();"
        if op == "wgmma.wait_group.sync.aligned": return f"wg.wait({a[0]});"
        if m := re.fullmatch(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(?:16\.f32\.(bf16|f16)|8\.f32\.(tf32))\.(?:\2|\3)", op):
            N, T = int(m.group(1)), {"bf16": "bf16", "f16": "__half", "tf32": "tf32"}[m.group(2) or m.group(3)]
            ta, tb = ("0", "0") if T == "tf32" else ("0", a[6]) if a[1].startswith("{") else (a[6], a[7])  # tf32 has no transposes
            regs = a[1].startswith("{")
            if a[4:6] != ["1", "1"]: raise KeyError(op)  # negated operands
            A = f"{{{', '.join(v(e, 'u32') for e in lst(a[1]))}}}, 0" if regs else f"{{}}, {v(a[1], 'u64')}"
            return (f"{{ u32* d[] = {{{', '.join('(u32*)&' + ident(e) for e in lst(a[0]))}}}; Wgmma<{N}> m = {{{{}}, {A}, {v(a[2], 'u64')}, {str(regs).lower()}, {ta}, {tb}}}; "
                    f"wg.run<{T}>(m, d, {v(a[3], 'bool')}, {HERE}); }}")
        if o == "mma":
            fn = {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": "do_mma_16816<bf16>", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": "do_mma_16816<__half>",
                  "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": "do_mma_1688_tf32"}[op]
            d, A, B, C = (lst(e) for e in a)
            return (f"{{ ptx::Mma m = {{{{{', '.join(v(e, 'float') for e in C)}}}, {{{', '.join(v(e, 'u32') for e in A)}}}, {{{', '.join(v(e, 'u32') for e in B)}}}}}; "
                    f"emu::collective(\"mma\", ~0u, true, ptx::{fn}, &m, {HERE}); " + " ".join(f"set({ident(e)}, m.d[{i}]);" for i, e in enumerate(d)) + " }")
        raise KeyError(op)


def split_operands(s):
    out, depth, cur = [], 0, ""
    for ch in s:
        depth += (ch in "{[(") - (ch in "}])")
        if ch == "," and depth == 0:
            out.append(cur.strip()); cur = ""
        else:
            cur += ch
    return out + [cur.strip()] if cur.strip() else out


def translate(src, export=False):
    """C++ of PTX text."""
    global EXPORT
    EXPORT, out = export, io.StringIO()
    with contextlib.redirect_stdout(out):
        _print(src)
    return out.getvalue()


def _print(src):
    files = {n: f for n, f in re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', src, re.M)}
    src = re.sub(r"//[^\n]*", "", src)
    shared = {}  # name -> (bytes or None if dynamic)
    decl = re.compile(r"\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d*)\]\s*;")
    for m in decl.finditer(src):
        shared[m.group(1)] = int(m.group(2)) if m.group(2) else None
    print('#include "ptx_rt.h"\nusing namespace ptxrt;\nnamespace {')
    for s, n in shared.items():
        if n is not None: print(f"const char {ident(s)}_key = 0;")
    for m in re.finditer(r"\.(?:global|const) \.align \d+ \.b8 ([\w$]+)\[\d+\] = (\{[^}]*\});", src):  # tables
        print(f"alignas(16) const u8 {ident(m.group(1))}_[] = {m.group(2)}; const u64 {ident(m.group(1))} = (u64){ident(m.group(1))}_;")
    entries = []
    for m in re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\n\{", src, re.S):
        name, params, attrs = m.groups()
        depth, end = 1, m.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(src[end], 0)
            end += 1
        body = src[m.end():end - 1]
        bound = re.search(r"\.(?:maxntid|reqntid) ([\d, ]+)", attrs)
        k = Kernel(shared)
        for i, q in enumerate(re.findall(r"([\w$]+)(?:\[\d+\])?\s*(?:,|$)", params.strip())): k.params[q] = i
        code, regs = [], {}
        body = decl.sub("", body)
        for r in re.finditer(r"^\s*\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>;", body, re.M): regs[r.group(2)] = TYPES[r.group(1)]
        body = re.sub(r"^\s*\.reg\s+\.\w+\s+%\w+<\d+>;", "", body, flags=re.M)
        body = re.sub(r"^(\s*\.loc[^\n]*)$", r"\1;", body, flags=re.M)
        body = re.sub(r"^(\s*\$?\w+:)", r"\1;", body, flags=re.M)
        writes = {}  # register -> how many instructions write it
        for w in re.finditer(r"(?:^|[;{}])\s*(?:@!?%\w+\s+)?(?!st\.|red\.|bra|bar|cp\.)[a-z][\w.:]*\s+(\{[^}]*\}|[%\w|]+)\s*,", body):
            for r in re.findall(r"%\w+", w.group(1)): writes[r] = writes.get(r, 0) + 1
        for st in body.split(";"):
            st = " ".join(st.split())
            while st.startswith(("{", "}")):
                code.append(st[0]); st = st[1:].strip()
            if not st: continue
            if mm := re.match(r"\.loc (?:.*inlined_at )?(\d+) (\d+)", st):
                if mm.group(2) != "0" and mm.group(1) in files: code.append(f'\n#line {mm.group(2)} "{files[mm.group(1)]}"')
            elif mm := re.match(r"\.local \.align \d+ \.b8 ([\w$]+)\[(\d+)\]", st):
                if re.search(r"\.reg \.b32\s+%SPL;", body): k.local32 = ident(mm.group(1)) + "_"
                k.out.append(f"alignas(16) char {ident(mm.group(1))}_[{mm.group(2)}]; u64 {ident(mm.group(1))} = {'0' if k.local32 else '(u64)' + ident(mm.group(1)) + '_'};")
            elif mm := re.match(r"\.reg \.(\w+) (.*)", st):
                names = [q for r in mm.group(2).split(",") for q in ([r[:r.index("<")] + str(i) for i in range(int(r[r.index("<") + 1:-1]))] if "<" in r else [r])]
                code.append(f"{TYPES[mm.group(1)]} {', '.join(ident(r.strip()) + '{}' for r in names)};")
            elif st.endswith(":"):
                code.append(f"{ident(st[:-1])}:;")
            elif st.startswith("."): continue
            else:
                mm = re.match(r"(?:@(!?)(%\w+)\s+)?([\w.:]+)\s*(.*)", st)
                a = split_operands(mm.group(4))
                try:
                    c = k.ins(mm.group(3), a)
                except KeyError:
                    raise ValueError(f"ptx2cpp: {name}: unknown instruction: {st}")
                if mm.group(2): c = f"if ({mm.group(1)}{ident(mm.group(2))}) {{ {c} }}"
                if mm.group(2) and mm.group(3).startswith("ld."):  # masked off, and nothing else sets the register: poison
                    r = [ident(r) for r in re.findall(r"%\w+", a[0]) if writes[r] == 1]
                    if r: c += " else { " + " ".join(f"poison({e});" for e in r) + " }"
                code.append(c)
        text = "\n".join(code)
        fn = f'extern "C" void ptx_{ident(name)[1:]}' if EXPORT else f"void k{len(entries)}"
        if EXPORT: print(f"}}\nextern \"C\" const unsigned ptx_{ident(name)[1:]}_threads = {math.prod(map(int, bound.group(1).split(','))) if bound else 0};")
        print(fn + "([[maybe_unused]] char** argv) {")
        for pre, ty in regs.items():
            used = sorted(set(re.findall(rf"\b{ident(pre)}\d*\b", text)))
            if used: print(f"{ty} " + ", ".join(u + "{}" for u in used) + ";")
        if "wg." in text: print("Wg wg;")
        if re.search(r"\bcc\b", text): print("u64 cc = 0;")
        for s in sorted(k.used):
            n = shared[s]
            print(f"const u32 {ident(s)} = emu::to_shared(" + (f"emu::shared_array(&{ident(s)}_key, \"{re.sub('.*?([a-zA-Z_]+)(E_)?(_[0-9]+)?$', chr(92) + '1', s)}\", {n})" if n is not None else "emu::dynamic_shared()") + ");")
        print("\n".join(k.out)); print(text); print('\n#line 1 "ptx"\n}')
        if EXPORT: print("namespace {")
        entries.append((name, math.prod(map(int, bound.group(1).split(','))) if bound else 1024))
    for i, (n, b) in enumerate([] if EXPORT else entries): print(f'emu::PtxEntry e{i}("{unmangle_anon(n)}", k{i}, {b});')
    print("}")


EXPORT = False
if __name__ == "__main__":
    sys.stdout.write(translate(open(sys.argv[-1]).read(), "--export" in sys.argv))
