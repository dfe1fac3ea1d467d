//! Compiles one kernel of one file and prints what ptxas says: `compile FILE CALL THREADS [MIN_BLOCKS] [ARCH | host]`.

use cuda::compile::{Target, compile_afresh, resources};
use cuda::{Kernel, Source};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, call, threads, rest @ ..] = &args[..] else {
        return Err("usage: compile FILE.cu 'kernel<bf16>' THREADS [MIN_BLOCKS] [80 | 90 | host]".into());
    };
    // the program ends when they do
    let leak = |s: String| -> &'static str { Box::leak(s.into_boxed_str()) };
    let folder = std::path::Path::new(file).parent().unwrap_or(std::path::Path::new("."));
    let mut headers = vec![];
    for entry in std::fs::read_dir(if folder.as_os_str().is_empty() { std::path::Path::new(".") } else { folder })? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "cuh") {
            headers.push((leak(path.file_name().unwrap_or_default().to_string_lossy().into_owned()), leak(std::fs::read_to_string(&path)?)));
        }
    }
    let source = Source { name: leak(file.clone()), text: leak(std::fs::read_to_string(file)?), headers: Vec::leak(headers), kernels: Vec::new };
    let min_blocks = rest.first().map_or(Ok(1), |s| s.parse())?;
    let targets = match rest.get(1).map(String::as_str) {
        None => vec![Target::Gpu(80), Target::Gpu(90)],
        Some("host") => vec![Target::Host],
        Some(arch) => vec![Target::Gpu(arch.parse()?)],
    };
    let kernel = Kernel::new(Box::leak(Box::new(source)), call.clone(), threads.parse()?).min_blocks(min_blocks);
    for t in targets {
        let start = std::time::Instant::now();
        let b = compile_afresh(&kernel, t)?;
        println!(
            "{t:?}: {} bytes in {:.2} s, {:?} (bound {})",
            b.code.len(),
            start.elapsed().as_secs_f64(),
            resources(&b.log),
            kernel.register_bound()
        );
        print!("{}", b.log);
    }
    Ok(())
}
