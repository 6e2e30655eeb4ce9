// java-spiffe: a watch and calls of one client, through a reload that gives and takes an entry, a restart and an outage.
//
// Its steps come from the script that runs it, one line each: what the watch and a call must have told by then.

import io.spiffe.exception.JwtSvidException;
import io.spiffe.workloadapi.DefaultWorkloadApiClient;
import io.spiffe.workloadapi.Watcher;
import io.spiffe.workloadapi.X509Context;
import java.io.BufferedReader;
import java.io.InputStreamReader;
import java.util.stream.Collectors;

public final class Course {
    private static final long PATIENCE = 90_000;

    private static String ids = "";

    private static synchronized void told(String now) {
        ids = now;
        Course.class.notifyAll();
    }

    private static synchronized void until(String want) throws Exception {
        long late = System.currentTimeMillis() + PATIENCE;
        while (!ids.equals(want)) {
            long left = late - System.currentTimeMillis();
            if (left <= 0) {
                throw new AssertionError(ids + ", not " + want);
            }
            Course.class.wait(left);
        }
    }

    public static void main(String[] args) throws Exception {
        var options = DefaultWorkloadApiClient.ClientOptions.builder().spiffeSocketPath("unix:" + args[0]).build();
        var client = DefaultWorkloadApiClient.newClient(options);
        client.watchX509Context(new Watcher<X509Context>() {
            @Override
            public void onUpdate(X509Context update) {
                told(update.getX509Svids().stream()
                        .map(svid -> svid.getSpiffeId().getPath().substring(1))
                        .sorted()
                        .collect(Collectors.joining(",")));
            }

            @Override
            public void onError(Throwable error) {
                System.err.println("the watch: " + error);
            }
        });
        var lines = new BufferedReader(new InputStreamReader(System.in));
        for (String line = lines.readLine(); line != null; line = lines.readLine()) {
            String[] step = line.split(" ");
            if (step[0].equals("forget")) {
                told("");
                continue;
            }
            until(step[1]);
            // What failed meanwhile is tried again, as an application would.
            int count = 0;
            for (int tries = 0; count == 0; tries++) {
                try {
                    count = client.fetchJwtSvids("a").size();
                } catch (JwtSvidException error) {
                    if (tries == 60) {
                        throw error;
                    }
                    Thread.sleep(1000);
                }
            }
            if (count != step[1].split(",").length) {
                throw new AssertionError(count + " tokens for " + step[1]);
            }
            System.out.println(step[0] + ": " + step[1]);
        }
        client.close();
        System.exit(0);
    }
}
