//! The node's pods, as the kubelet is asked for them: one view, which all callers share.

use std::{sync::Arc, time::Duration};

use tokio::runtime::Runtime;

use super::{
    asker::ServiceQuestion,
    client::KubernetesClient,
    fault::KubernetesFault,
    metrics::{RequestSeries, SeriesWords},
    pods::PodList,
    rhythm::RequestRhythm,
};

/// What the kubelet said.
#[derive(Debug)]
pub(super) struct PodView {
    pub(super) pods: PodList,
    /// The node that it was asked for, if that is known.
    pub(super) node: Option<Arc<str>>,
}

/// Which pods there are.
pub(super) struct PodsQuestion;

impl ServiceQuestion for PodsQuestion {
    /// All of them.
    type Key = ();
    type Answer = PodView;

    const THREAD: &'static str = "kubelet";
    const RHYTHM: RequestRhythm = RequestRhythm {
        a_second: 4,
        pause: Duration::from_millis(100),
        pause_after_fault: Duration::from_millis(100),
    };
    const SERIES: RequestSeries = RequestSeries {
        requests: SeriesWords {
            name: "durward_kubelet_requests_total",
            help: "Requests to the kubelet for its pods, by what came of them.",
        },
        counted: SeriesWords { name: "durward_kubelet_pods", help: "Pods in the last list of the kubelet." },
    };
    const TROUBLE: &'static str =
        "the kubelet does not list its pods, so callers in pods cannot be identified";
    const UNTRIED: &'static str = "the kubelet has not said yet which pods there are";

    fn ask(client: &mut KubernetesClient, runtime: &Runtime, _all: &()) -> Result<PodView, KubernetesFault> {
        let pods = client.get(runtime, "/pods", |body| PodList::read(body))?;
        Ok(PodView { pods, node: client.name().map(Arc::from) })
    }

    fn size(view: &PodView) -> usize {
        view.pods.size()
    }

    fn count(view: &PodView) -> usize {
        view.pods.len()
    }
}
